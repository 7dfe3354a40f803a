"""Latents, or any arrays with labels, in files of array_record: random access at the scale of ImageNet.

    latents.write("latents/train-00000.array_record", arrays, labels)
    source = latents.read(sorted(Path("latents").glob("*.array_record")))

A record is its label, int32 and little-endian, and then an array as `numpy.save` writes it.
"""

import functools
import io
import operator
import struct

import numpy as np

from fmjax import files
from fmjax.data import images

__all__ = ["write", "read"]

REAL = "biuf"
"""Kinds of NumPy's dtypes that float32 can stand for."""


def write(file, arrays, labels) -> None:
    """Writes pairs to a file, all of them or none.

    Args:
      file: where to, in place of what was there once all are written; its folder exists.
      arrays: an iterable of arrays of real numbers, float16 for half the size.
      labels: an iterable of as many integers.
    Raises:
      ImportError: if array_record is not installed (`pip install fmjax[images]`).
      TypeError: if an array is not of real numbers, or a label is no integer.
      ValueError: if there are not as many labels as arrays, a number is not one that float32 has room for, or a label is none of int32.
      OSError: if the file cannot be written; what was there stays.
    """
    package = _package()
    with files.replacing(file) as part:
        writer = package.ArrayRecordWriter(str(part), "group_size:1")
        try:
            for index, (array, label) in enumerate(zip(arrays, labels, strict=True)):
                writer.write(_encode(index, np.asarray(array), label))
        except RuntimeError as error:
            raise OSError(f"{file} could not be written, and what was there stays: {error}.") from error
        finally:
            writer.close()


def read(paths) -> images.Source:
    """A source over files of `write`, one after another, as for `data.pipeline`.

    Args:
      paths: of the files.
    Returns:
      An `images.Source` of pairs `(array, label)`, float32 and int32.
    Raises:
      ImportError: if array_record is not installed (`pip install fmjax[images]`).
      FileNotFoundError: if there are no files, or one is missing.
      ValueError: if a file is not of array_record or is cut short; when a record is read, if it is not a label and an array.
    """
    paths = [str(path) for path in paths]
    if not paths:
        raise FileNotFoundError("There are no files of latents: give paths that end in .array_record.")
    package, lengths = _package(), []
    for file in paths:
        try:
            reader = package.ArrayRecordReader(file)
            lengths.append(reader.num_records())
            reader.close()
        except Exception as error:
            missing = "NOT_FOUND" in str(error) or "No such file" in str(error)
            kind, what = (FileNotFoundError, "is not there") if missing else (ValueError, "is not a whole file of array_record")
            raise kind(f"{file} {what}: {str(error).partition(chr(10))[0]}") from error
    from grain.sources import ArrayRecordDataSource

    return images.Source(sum(lengths), functools.partial(_record, ArrayRecordDataSource(paths)))


def _encode(index, array, label):
    """A record."""
    if array.dtype.kind == "V" and np.can_cast(array.dtype, np.float32):
        # NumPy's files do not know bfloat16.
        array = array.astype(np.float32)
    if array.dtype.kind not in REAL:
        raise TypeError(f"Array {index} has dtype {array.dtype}; expected real numbers: give its parts as channels, or decode it.")
    with np.errstate(over="ignore"):
        read = array.astype(np.float32)
    long = array.dtype.kind in "iu" and array.size and max(-int(array.min()), int(array.max())) > 2**24
    if long or not np.array_equal(np.isfinite(read), np.isfinite(array)):
        raise ValueError(f"Array {index} has numbers that float32, as which it is read, has no room for: scale it first.")
    try:
        number = struct.pack("<i", operator.index(label))
    except TypeError as error:
        raise TypeError(f"Label {index} is {label!r}; expected an integer.") from error
    except struct.error as error:
        raise ValueError(f"Label {index} is {label}; expected an integer of 32 bits.") from error
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return number + content.getvalue()


def _record(source, index):
    content = source[index]
    try:
        array = np.load(io.BytesIO(content[4:]), allow_pickle=False)
        if array.dtype.kind not in REAL:
            raise ValueError(f"its dtype is {array.dtype}")
        return array.astype(np.float32), np.int32(struct.unpack_from("<i", content)[0])
    except (ValueError, EOFError, struct.error) as error:
        raise ValueError(f"Record {index} is not a label and an array of numpy ({error}): write it by latents.write.") from error


def _package():
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ImportError("data.latents needs array_record: pip install 'fmjax[images]'") from error
    return array_record_module
