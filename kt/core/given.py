"""Features that were made elsewhere: a `.npy` with a row an image, and a text file of keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kt.core import images, table
from kt.core.step import DataError


def read(path: Path, keys: Path, pack: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the rows of a pack's images.

    Args:
        path: `.npy`, (n, D) float16, float32 or float64.
        keys: Text file in UTF-8, a key of the data set on each line, in the order of the rows.
        pack: Packed images; each must have a row, rows of other images are left aside.

    Returns:
        (n, D) as it stands, memory-mapped; keys (N,) bytes of the pack; (N,) int64, their rows.

    Raises:
        DataError: A file is none of these, or keys are missing or repeated.
    """
    features, known = _array(path), _lines(keys)
    if len(known) != len(features):
        raise DataError(
            f"{keys}: expected a key for each of the {len(features)} rows of {path}, found "
            f"{len(known)}"
        )
    with table.read(pack, "images", {"keys": 1}) as file:
        wanted = table.load(file, "keys")
    rows = images.rows_of(known, [key.decode() for key in wanted.tolist()], str(keys))
    return features, wanted, rows


def _array(path: Path) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise DataError(f"{path} is no .npy file of numbers: {error}") from error
    except FileNotFoundError:
        raise DataError(f"expected features at {path}, found no file") from None
    if array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        raise DataError(
            f"{path}: expected an array (N, D) of floats, found {array.shape} {array.dtype}"
        )
    return array


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise DataError(
            f"expected the keys of the features at {path}, one a line, found no file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected keys in UTF-8: {error}") from None
