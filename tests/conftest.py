"""What all tests share: one CPU thread, so that they are quick beside others and repeatable."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
