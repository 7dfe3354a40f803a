"""Images from anywhere, as sources: `len(source)`, and `source[index]` is one `(image, label)`.

An image is (size, size, channels), float32 in [-1, 1], the largest square of its middle; a label is int32. Sources go
through `data.pipeline`, through grain, and into other processes by pickle.
"""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["folder", "records", "arrays", "files", "read", "Source", "scale"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""What a file may be, whatever its name says: Pillow has formats that run other programs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Random access to pairs `(image, label)`."""

    length: int
    """How many there are."""
    read: Callable = dataclasses.field(repr=False)
    """index in [0, length) -> (image, label)."""
    classes: tuple[str, ...] = ()
    """The names of the labels, where they are known."""
    broken: tuple[str, ...] = ()
    """The files left out because they cannot be decoded."""

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"index is {index}; expected one in [0, {self.length}).")
        return self.read(index)


def scale(pixels) -> np.ndarray:
    """Pixels as numbers in [-1, 1].

    x / 127.5 - 1

    Args:
      pixels: any shape, uint8 in [0, 255].
    Returns:
      Like pixels, float32.
    Raises:
      TypeError: if the pixels are not uint8.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"The pixels have dtype {pixels.dtype}; expected uint8, which goes from 0 to 255: cast them.")
    return pixels.astype(np.float32) / 127.5 - 1


def arrays(images, labels) -> Source:
    """A source over arrays in memory, such as `digits.load` returns.

    Args:
      images: (N, ...), any dtype; they are given out as they are.
      labels: (N,).
    Returns:
      A `Source` of N.
    Raises:
      ValueError: if the lengths differ.
    """
    if len(images) != len(labels):
        raise ValueError(f"There are {len(images)} images and {len(labels)} labels; expected a label for each image.")
    return Source(len(images), functools.partial(_pair, images, labels))


def folder(root, *, size, channels=3, skip_broken=False) -> Source:
    """A source over `root/<class>/**/<image>`: png, jpg, jpeg, bmp, webp or gif (its first frame), turned as EXIF says.

    The classes are the sorted names of the folders in `root`; if it has none, the images in it are one class, named after
    it. Hidden files and folders (`.name`) do not count.

    Args:
      root: the folder.
      size: of the square images, in pixels.
      channels: 3 for RGB, 1 for grey; transparency is dropped.
      skip_broken: by default an image that cannot be decoded is an error when it is read. With True all are decoded now,
        which takes as long as one epoch of reading, and the broken ones are left out, with a warning, and listed in `broken`.
    Returns:
      A `Source` with `classes` and `broken`, in the order of the sorted paths of each class.
    Raises:
      ImportError: if Pillow is not installed (`pip install fmjax[images]`).
      FileNotFoundError: if there is no such folder.
      ValueError: if `size` is below 1 or `channels` neither 1 nor 3; if the folder or one of its classes has no images, or it has images
        both in classes and beside them; and, when an image is read, if it cannot be decoded.
    """
    _check(size, channels)
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected one of images, or of one folder of images per class.")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    beside = _images_in(root, root.iterdir())
    if classes and beside:
        raise ValueError(f"{root} has images ({Path(beside[0]).name}) beside its folders ({classes[0]}); expected one or the other.")
    found = [_images_in(root / name, (root / name).rglob("*")) for name in classes] if classes else [beside]
    for name, of_class in zip(classes or [""], found, strict=True):
        if not of_class:
            raise ValueError(f"{root / name} has no images; expected files that end in {', '.join(SUFFIXES)}.")
    files = [(file, label) for label, of_class in enumerate(found) for file in of_class]
    broken = []
    if skip_broken:
        files, broken = _sound(files)
        if not files:
            raise ValueError(f"None of the {len(broken)} images in {root} can be decoded; expected some that can.")
        if broken:
            names = ", ".join(broken[:10]) + (", ..." if len(broken) > 10 else "")
            warnings.warn(f"{len(broken)} of {len(files) + len(broken)} images cannot be decoded, and are left out: {names}", stacklevel=2)
    names = tuple(classes) or (root.resolve().name,)
    return Source(len(files), functools.partial(_read_file, files, size, channels), names, tuple(broken))


def records(source, *, size, channels=3, image="image", label="label") -> Source:
    """A source over anything that indexes to mappings, as the data sets of Hugging Face and TFDS do.

        images.records(datasets.load_dataset("zalando-datasets/fashion_mnist", split="train"), size=28, channels=1)
        images.records(tfds.data_source("mnist", split="train"), size=28, channels=1)

    Args:
      source: has a length and gives mappings, whose image is a PIL image or an array (H, W) or (H, W, C), uint8, of 1, 3
        or 4 channels.
      size: of the square images, in pixels.
      channels: 3 for RGB, 1 for grey; transparency is dropped.
      image: the key of the image.
      label: the key of the label, an integer; None labels all 0.
    Returns:
      A `Source` as long as the given one.
    Raises:
      ImportError: if Pillow is not installed (`pip install fmjax[images]`).
      KeyError: when a record is read, if it lacks a key.
      TypeError: likewise, if its image or its label is of another type.
      ValueError: if `size` is below 1 or `channels` neither 1 nor 3; when a record is read, if the array is not of such a shape.
    """
    _check(size, channels)
    return Source(len(source), functools.partial(_read_record, source, size, channels, image, label))


def files(root) -> list[str]:
    """The images in a folder and in those below it, png, jpg, jpeg, bmp, webp or gif; hidden ones do not count.

    Args:
      root: the folder.
    Returns:
      Their paths, sorted.
    Raises:
      FileNotFoundError: if there is no such folder, or no image in it.
    """
    root = Path(root)
    found = _images_in(root, root.rglob("*")) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{root} is no folder with images; expected files that end in {', '.join(SUFFIXES)}.")
    return found


def read(file, channels=3) -> np.ndarray:
    """An image as it is, turned as EXIF says; transparency is dropped.

    Args:
      file: of one of the kinds of `files`.
      channels: 3 for RGB, 1 for grey.
    Returns:
      (H, W, channels), uint8.
    Raises:
      ImportError: if Pillow is not installed (`pip install fmjax[images]`).
      ValueError: if it cannot be decoded, or `channels` is neither 1 nor 3.
    """
    _check(1, channels)
    return _decoded(file, lambda picture: _array(_eight_bits(picture), channels))


def _check(size, channels):
    _pillow()
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"size is {size} and channels {channels}; expected a size of at least 1, and 1 or 3 channels.")


def _pillow():
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("data.images needs Pillow: pip install 'fmjax[images]'") from error
    return PIL


def _images_in(root, paths):
    def counts(path):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        return path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir()

    return sorted(str(path) for path in paths if counts(path))


def _sound(files):
    sound, broken = [], []
    for file, label in files:
        try:
            _open(file, 1, 1)
            sound.append((file, label))
        except ValueError:
            broken.append(file)
    return sound, broken


def _pair(images, labels, index):
    return images[index], labels[index]


def _read_file(files, size, channels, index):
    file, label = files[index]
    return _open(file, size, channels), np.int32(label)


def _read_record(source, size, channels, image, label, index):
    record = source[index]
    for key in (image, label):
        if key is not None and key not in record:
            raise KeyError(f"Record {index} has no {key!r}; expected one of its keys, {', '.join(map(repr, record))}: name it.")
    picture, number = record[image], 0 if label is None else record[label]
    PIL = _pillow()
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (1, 3, 4)) or not picture.size:
            raise ValueError(f"Record {index} has an image of shape {picture.shape}; expected (H, W), or (H, W, C) with C of 1, 3 or 4.")
        picture = PIL.Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)
    elif not isinstance(picture, PIL.Image.Image):
        kind = f"an array of {picture.dtype}" if isinstance(picture, np.ndarray) else f"a {type(picture).__name__}"
        raise TypeError(f"Record {index} has {kind} as {image!r}; expected a PIL image or an array of uint8: decode or cast it.")
    try:
        number = operator.index(number)
    except TypeError as error:
        raise TypeError(f"Record {index} has {number!r} as {label!r}; expected an integer: encode it, or give label=None.") from error
    return _square(picture, size, channels), np.int32(number)


def _open(file, size, channels):
    return _decoded(file, lambda picture: _square(picture, size, channels))


def _decoded(file, use):
    """What is made of a file's picture."""
    PIL = _pillow()
    if not Path(file).is_file():
        raise ValueError(f"{file} is no file of its own (a pipe, a device, a broken link?). Remove it, or give skip_broken=True.")
    try:
        with PIL.Image.open(file, formats=FORMATS) as picture:
            return use(PIL.ImageOps.exif_transpose(picture))
    # Pillow's decoders raise nearly anything, from OSError to struct.error, on damaged data.
    except Exception as error:
        raise ValueError(f"{file} cannot be decoded: {error}. Mend it, remove it, or give skip_broken=True.") from error


def _eight_bits(picture):
    if picture.mode.startswith("I;16"):
        # Pillow would clip sixteen bits to eight.
        return _pillow().Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"The image has the mode {picture.mode}, of 32 bits; expected 8 or 16 bits per channel: convert it.")
    return picture


def _array(picture, channels):
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _square(picture, size, channels):
    PIL = _pillow()
    picture = _eight_bits(picture)
    side = min(picture.size)
    # Whole pixels, so that a square of the wanted size comes out as it is.
    left, top = ((length - side) // 2 for length in picture.size)
    picture = picture.convert("L" if channels == 1 else "RGB").crop((left, top, left + side, top + side))
    picture = picture.resize((size, size), PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)
    return scale(np.asarray(picture).reshape(size, size, channels))
