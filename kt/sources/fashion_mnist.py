"""Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28 x 28, ten classes (MIT licence).

`path` may be a folder with the four `.gz` files. Else they come, in this order, from the cache
(`$KT_DATA/fashion-mnist` or `~/.cache/kt/fashion-mnist`), an installed Debian package,
torchvision's mirror, or the Debian package from its archive. What they hold is checked by SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import subprocess
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from gzip import GzipFile
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from kt.config import Dataset
from kt.core.entries import TEST, TRAIN, Entry
from kt.core.step import DataError

log = logging.getLogger("kt")

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# SHA-256 of the unpacked content: Debian has packed the same content anew.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MOST_BYTES = 64 << 20  # unpacked, of any of them
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
TIMEOUT = 5.0  # seconds without an answer
DEADLINE = 120.0  # seconds for all four files from the mirror

Files = dict[str, bytes]


def entries(dataset: Dataset) -> Iterator[Entry]:
    """Gives the pictures of train, then test, in file order.

    Raises:
        DataError: The files could not be had from anywhere, or are not the true ones.
    """
    files, _ = _load(dataset.path)
    for split, stem in ((TRAIN, "train"), (TEST, "t10k")):
        images = _array(files[f"{stem}-images-idx3-ubyte"], 16).reshape(-1, 28, 28)
        labels = _array(files[f"{stem}-labels-idx1-ubyte"], 8)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            key = f"{split}/{row:05d}"
            yield Entry(split, key, CLASSES[label], lambda pixels=image: pixels)


def origin(dataset: Dataset) -> dict[str, Any]:
    """Says which place served the files, and their digests."""
    return {"place": _load(dataset.path)[1], "sha256": DIGESTS}


@functools.lru_cache(maxsize=1)
def _load(path: str | None) -> tuple[Files, str]:
    """Gives the four files' unpacked content and the place that served them."""
    if path:
        return _from_folder(Path(path)), path
    cache = Path(os.environ.get("KT_DATA") or Path.home() / ".cache" / "kt") / "fashion-mnist"
    places: list[tuple[str, Callable[[], Files]]] = [
        (f"the cache {cache}", lambda: _from_folder(cache)),
        (f"the installed package in {INSTALLED}", lambda: _from_folder(INSTALLED)),
        (f"the mirror {MIRROR}", lambda: _from_mirror(cache)),
        (f"the Debian package {PACKAGE}", lambda: _from_debian(cache)),
    ]
    faults = []
    for place, fetch in places:
        try:
            files = fetch()
        except (DataError, OSError, HTTPException, subprocess.SubprocessError) as error:
            faults.append(f"{place}: {error}")
            log.info("Fashion-MNIST: not from %s", faults[-1])
        else:
            log.info("Fashion-MNIST: from %s", place)
            return files, place
    raise DataError(
        "Fashion-MNIST could not be had from any place:\n  "
        + "\n  ".join(faults)
        + f"\n  put {', '.join(f'{name}.gz' for name in DIGESTS)} into a folder "
        "and give it as `path` of the data set (datasets.fashion_mnist.path)"
    )


def _from_folder(folder: Path) -> Files:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    missing = [f"{name}.gz" for name in DIGESTS if not _at(folder, name).is_file()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} is missing")
    return {name: _unpacked(name, _at(folder, name).read_bytes(), folder) for name in DIGESTS}


def _at(folder: Path, name: str) -> Path:
    return folder / f"{name}.gz"


def _from_mirror(cache: Path) -> Files:
    end = time.monotonic() + DEADLINE
    packed = {name: _download(f"{MIRROR}{name}.gz", end) for name in DIGESTS}
    return _kept(packed, cache, MIRROR)


def _download(url: str, end: float) -> bytes:
    payload = bytearray()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        while block := answer.read(1 << 18):
            payload += block
            if time.monotonic() > end or len(payload) > MOST_BYTES:
                raise DataError(
                    f"{url}: given up after {len(payload)} bytes, too slow or too large"
                )
    return bytes(payload)


def _from_debian(cache: Path) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        options = ["-o", f"Acquire::http::Timeout={TIMEOUT:.0f}", "-o", "Acquire::Retries=0"]
        download = ["apt-get", *options, "download", PACKAGE]
        try:
            _run(download, folder)
        except DataError:
            if os.geteuid() != 0:
                raise
            _run(["apt-get", *options, "update"], folder)  # a fresh container has no lists
            _run(download, folder)
        for package in Path(folder).glob(f"{PACKAGE}_*.deb"):
            _run(["dpkg-deb", "-x", str(package), folder], folder)
        place = Path(folder) / INSTALLED.relative_to("/")
        return _kept({name: _at(place, name).read_bytes() for name in DIGESTS}, cache, PACKAGE)


def _run(command: list[str], folder: str) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"`{command[0]}` ended with {done.returncode}: {last}")


def _kept(packed: Files, cache: Path, place) -> Files:
    """Checks fetched files and keeps them in the cache, each renamed into its place."""
    files = {name: _unpacked(name, payload, place) for name, payload in packed.items()}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name, payload in packed.items():
            temporary = cache / f".{name}.{os.getpid()}.tmp"
            temporary.write_bytes(payload)
            os.replace(temporary, _at(cache, name))
    except OSError as error:
        log.info("Fashion-MNIST: not kept in %s: %s", cache, error)
    return files


def _unpacked(name: str, payload: bytes, place) -> bytes:
    try:
        content = GzipFile(fileobj=io.BytesIO(payload)).read(MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{place}: {name}.gz is not a whole .gz file: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != DIGESTS[name]:
        raise DataError(
            f"{place}: {name}.gz is not the true file: "
            f"expected SHA-256 {DIGESTS[name]} of its content, found {found}"
        )
    return content


def _array(content: bytes, header: int) -> np.ndarray:
    return np.frombuffer(content, np.uint8, offset=header)
