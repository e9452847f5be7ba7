"""Kinds of transfer: what a target is taught, one file each (contract: `kt/core/transfer.py`)."""
