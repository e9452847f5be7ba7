"""Features that were made elsewhere: `.npy` and a text file of keys, or both in one HDF5 file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from kt.core import images, table
from kt.core.step import DataError

HDF5 = (".h5", ".hdf5")
ENDS = (".npy", *HDF5)


class Rows:
    """Rows of an HDF5 array, to be asked for in any order: it reads ascending ones only."""

    def __init__(self, dataset: h5py.Dataset):
        """Takes (n, D)."""
        self.dataset, self.shape = dataset, dataset.shape

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Gives the rows (B,) int64, each one once."""
        order = np.argsort(rows)
        found = np.empty((len(rows), self.shape[1]), self.dataset.dtype)
        found[order] = self.dataset[rows[order]]
        return found


def read(path: Path, keys: Path, pack: Path) -> tuple[np.ndarray | Rows, np.ndarray, np.ndarray]:
    """Finds the rows of a pack's images.

    Args:
        path: `.npy`, (n, D) float16, float32 or float64; or HDF5 with such `features` and `keys`.
        keys: Text file in UTF-8, a key of the data set on each line, in the order of the rows; with
            HDF5 the same file.
        pack: Packed images; each must have a row, rows of other images are left aside.

    Returns:
        (n, D) as it stands, not in memory; keys (N,) bytes of the pack; (N,) int64, their rows.

    Raises:
        DataError: A file is none of these, or keys are missing or repeated.
    """
    features, known = _hdf5(path) if path.suffix in HDF5 else (_array(path), _lines(keys))
    if len(known) != len(features):
        raise DataError(
            f"{keys}: expected a key for each of the {len(features)} rows of {path}, found "
            f"{len(known)}; if a picture's name holds a line break, give an .h5 with `keys` instead"
        )
    with table.read(pack, "images", {"keys": 1}) as file:
        wanted = table.load(file, "keys")
    advice = f"every image of {pack} needs a row in {path}"
    rows = images.rows_of(known, [key.decode() for key in wanted.tolist()], str(keys), advice)
    return features, wanted, rows


def _array(path: Path) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise DataError(f"{path} is no .npy file of numbers: {error}") from error
    except FileNotFoundError:
        raise DataError(f"expected features at {path}, found no file") from None
    _check(path, array)
    return array


def _check(path: Path, array) -> None:
    if array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        raise DataError(
            f"{path}: expected an array (N, D) of floats, found {array.shape} {array.dtype}"
        )


def _hdf5(path: Path) -> tuple[Rows, list[str]]:
    try:
        file = h5py.File(path, "r")
        found = [table.own(file, path, name) for name in ("features", "keys")]
        if h5py.check_string_dtype(found[1].dtype) is None or found[1].ndim != 1:
            raise TypeError(f"keys are {found[1].dtype}, {found[1].shape}")
        keys = [key.decode() for key in found[1][...].tolist()]
    except FileNotFoundError:
        raise DataError(f"expected features at {path}, found no file") from None
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path}: expected HDF5 with features (n, D) of floats and keys (n,) of UTF-8 strings: "
            f"{error}"
        ) from None
    _check(path, found[0])
    return Rows(found[0]), keys


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise DataError(
            f"expected the keys of the features at {path}, one a line, found no file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected keys in UTF-8: {error}") from None
