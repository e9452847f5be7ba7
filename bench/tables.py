"""Tables on disk: writing against raw bytes, a sample of rows against fancy indexing."""

from __future__ import annotations

import functools
import os

import h5py
import numpy as np

from bench import drawn, product
from bench.clustering import features
from bench.measure import Measured, Run, alternate, speeds

WRITTEN, READ, D = 50_000, 100_000, 512


def hdf5_write_of_raw(run: Run) -> Measured:
    """Compares the writing of a features table, digest and fsync included, with its bare bytes."""
    rows, keys = drawn.features(WRITTEN, D), drawn.keys(WRITTEN)
    raw = run.scratch / "raw.bin"

    def floor():
        with open(raw, "wb") as file:
            file.write(rows.data)
            file.flush()
            os.fsync(file.fileno())

    path = run.scratch / "written.h5"
    pairs = alternate(lambda: product.write_features(path, rows, keys) and None, floor, run.rounds)
    more = {"bytes": rows.nbytes, "folder": os.fspath(run.scratch)}
    return Measured(speeds(pairs), "write and fsync of the same bytes", pairs, more)


def hdf5_sample_vs_fancy(run: Run) -> Measured:
    """Compares the product's reading of half of the rows with `dataset[rows]`.

    Both draw the rows first, in the same way. Half is what `sample: 25` takes here for k = 2,000.
    `more` holds the ratio for a tenth.
    """
    path = features(run, READ, D)

    def compared(count: int):
        def fancy():
            rows = product.sampled(READ, count)
            with h5py.File(path, "r") as file:
                return file["features"][rows]

        assert np.array_equal(product.sample_features(path, count), fancy())
        ours = functools.partial(product.sample_features, path, count)
        return alternate(lambda: ours() is None, fancy, run.rounds)

    pairs, few = (compared(READ // part) for part in (2, 10))
    more = {"also": {"a tenth of the rows": round(float(np.median(speeds(few))), 2)}}
    return Measured(speeds(pairs), f"h5py {h5py.__version__}, fancy indexing", pairs, more)
