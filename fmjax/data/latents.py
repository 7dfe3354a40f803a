"""Latents, or any arrays with labels, in files of array_record: random access at the scale of ImageNet.

    latents.write("latents/train-00000.array_record", arrays, labels)
    source = latents.read(sorted(Path("latents").glob("*.array_record")))

A record is its label, int32 and little-endian, and then an array as `numpy.save` writes it.
"""

import functools
import io
import struct

import numpy as np

from fmjax.data import images


def write(file, arrays, labels):
    """Writes pairs to a file.

    Args:
      file: where to, in place of what was there; its folder exists.
      arrays: an iterable of arrays, float16 for half the size.
      labels: an iterable of as many integers.
    Raises:
      ImportError: if array_record is not installed (`pip install fmjax[images]`).
      ValueError: if there are not as many labels as arrays.
    """
    writer = _package().ArrayRecordWriter(str(file), "group_size:1")
    try:
        for array, label in zip(arrays, labels, strict=True):
            content = io.BytesIO()
            np.save(content, np.asarray(array), allow_pickle=False)
            writer.write(struct.pack("<i", int(label)) + content.getvalue())
    finally:
        writer.close()


def read(files):
    """A source over files of `write`, one after another, as for `data.pipeline`.

    Args:
      files: paths.
    Returns:
      An `images.Source` of pairs `(array, label)`, float32 and int32.
    Raises:
      ImportError: if array_record is not installed (`pip install fmjax[images]`).
      FileNotFoundError: if there are no files, or one is missing.
      ValueError: if a file is not of array_record or is cut short; when a record is read, if it is not a label and an array.
    """
    files = [str(file) for file in files]
    if not files:
        raise FileNotFoundError("There are no files of latents: give paths that end in .array_record.")
    package, lengths = _package(), []
    for file in files:
        try:
            reader = package.ArrayRecordReader(file)
            lengths.append(reader.num_records())
            reader.close()
        except Exception as error:
            missing = "NOT_FOUND" in str(error) or "No such file" in str(error)
            kind, what = (FileNotFoundError, "is not there") if missing else (ValueError, "is not a whole file of array_record")
            raise kind(f"{file} {what}: {str(error).partition(chr(10))[0]}") from error
    from grain.sources import ArrayRecordDataSource

    return images.Source(sum(lengths), functools.partial(_record, ArrayRecordDataSource(files)))


def _record(source, index):
    content = source[index]
    try:
        array = np.load(io.BytesIO(content[4:]), allow_pickle=False)
        return array.astype(np.float32), np.int32(struct.unpack_from("<i", content)[0])
    except (ValueError, EOFError, struct.error) as error:
        raise ValueError(f"Record {index} is not a label and an array of numpy ({error}): write it by latents.write.") from error


def _package():
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ImportError("data.latents needs array_record: pip install 'fmjax[images]'") from error
    return array_record_module
