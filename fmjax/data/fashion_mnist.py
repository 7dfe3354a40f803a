"""Fashion-MNIST: 70,000 real images of clothing, 28 x 28 pixels, in ten classes (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747)."""

import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from fmjax import files
from fmjax.data import images

__all__ = ["load", "NAMES", "CLASSES", "read_idx"]

CLASSES = 10
"""How many classes there are."""
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
"""The classes' names, in the order of their labels."""

MOST = 2**28
"""Bytes of an idx file; those of Fashion-MNIST have a sixth of that."""
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of the published files, whose published MD5 is beside it. Debian packs the same bytes anew, so its files have others.
FILES = {
    # 8d4fb7e6c68d591d4c3dfef9ec88bf0d
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    # 25c81989df183df01b3e8a0aad5dffbe
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    # bef4ecab320f06d8554ea6380940ec79
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    # bb300cfdad3c16e7a12a480ee83cd310
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


def load(folder=None) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST, split as published.

    Args:
      folder: where the four idx files are, packed (`.gz`) or not. By default they are those of Debian's package
        dataset-fashion-mnist if it is installed, else of ~/.cache/fmjax/fashion-mnist (under XDG_CACHE_HOME if set),
        where they are downloaded once.
    Returns:
      `(images, labels)` for training, 60,000, and `(images, labels)` for testing, 10,000: images (N, 28, 28, 1), float32
      in [-1, 1], and labels (N,), int32 in [0, 10), named by `NAMES`.
    Raises:
      FileNotFoundError: if one of the files is not in the folder.
      ConnectionError: if a file cannot be downloaded.
      ValueError: if a file is broken, or the images and the labels do not belong together.
    """
    if folder is None:
        folder = DEBIAN if DEBIAN.is_dir() else _download()
    return _part(Path(folder), "train"), _part(Path(folder), "t10k")


def read_idx(file, dimensions) -> np.ndarray:
    """The array in an idx file of bytes: a big-endian header of magic number and lengths, then the values.

    Args:
      file: its path; one that ends in `.gz` is unpacked.
      dimensions: how many the array has, 3 for images and 1 for labels.
    Returns:
      The array, uint8, of the header's shape.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, or its magic number or its size is wrong.
    """
    expected, start = f"{0x0800 + dimensions:08x}", 4 + 4 * dimensions
    try:
        with gzip.open(file) if str(file).endswith(".gz") else Path(file).open("rb") as stream:
            header = stream.read(start)
            if header[:4].hex() != expected:
                raise ValueError(
                    f"{file} starts with 0x{header[:4].hex()}; expected 0x{expected}, idx of bytes with {dimensions} dimension(s)."
                )
            if len(header) < start:
                raise ValueError(f"{file} has {len(header)} bytes; expected a header of {start}. Fetch it again.")
            shape = tuple(int(n) for n in np.frombuffer(header[4:], ">u4"))
            if math.prod(shape) > MOST:
                raise ValueError(f"{file} has the shape {shape} in its header; expected at most {MOST} bytes: is it of another data set?")
            # A small packed file may unpack to anything: no more is read than belongs there, and one byte to see whether there is more.
            content = stream.read(math.prod(shape) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}; expected a whole gzip file. Fetch it again.") from error
    if len(content) != math.prod(shape):
        given = f"{len(content)} bytes" if len(content) < math.prod(shape) else "more"
        raise ValueError(f"{file} has {given} after its header; expected {math.prod(shape)}, of shape {shape}. Fetch it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _part(folder, name):
    image_file, label_file = _find(folder, f"{name}-images-idx3-ubyte"), _find(folder, f"{name}-labels-idx1-ubyte")
    pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if pixels.shape[1:] != (28, 28):
        raise ValueError(f"{image_file} has images of {pixels.shape[1:]} pixels; expected (28, 28): is it of another data set?")
    if len(pixels) != len(labels):
        raise ValueError(
            f"{image_file} has {len(pixels)} images and {label_file} {len(labels)} labels; expected as many: are they of one set?"
        )
    if labels.size and labels.max() >= CLASSES:
        raise ValueError(f"{label_file} has the label {labels.max()}; expected labels below {CLASSES}: is it of another data set?")
    return images.scale(pixels[..., None]), labels.astype(np.int32)


def _find(folder, name):
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder} has neither {name}.gz nor {name}: put the four files of Fashion-MNIST ({ADDRESS}) there.")


def _download():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fmjax" / "fashion-mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in FILES.items():
        if (folder / name).exists():
            continue
        try:
            with urllib.request.urlopen(ADDRESS + name, timeout=60) as answer:
                content = answer.read(MOST)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"Cannot download {ADDRESS}{name}: {error}. Put the four files ({', '.join(FILES)}) in a folder and call "
                "load(folder), or install Debian's package: apt install dataset-fashion-mnist."
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise ValueError(
                f"{ADDRESS}{name} has the SHA-256 {found}; expected {digest}. It was not kept: try again, or call load(folder)."
            )
        # Under another name first: whoever sees the name sees the whole file, also when two processes download.
        with files.replacing(folder / name) as part:
            part.write_bytes(content)
    return folder
