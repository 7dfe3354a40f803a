"""Latents to files of array_record and back, through the pipeline too; and what is said of files that are not that."""

import io
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.data import latents, pipeline

ARRAYS = np.random.default_rng(0).normal(size=(20, 4, 4, 2)).astype(np.float16)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{part}.array_record" for part in range(2)]
    for part, path in enumerate(paths):
        latents.write(path, ARRAYS[10 * part : 10 * part + 10], range(10 * part, 10 * part + 10))
    return paths


def test_round_trip(files):
    source = pickle.loads(pickle.dumps(latents.read(files)))
    assert len(source) == 20
    for index in (0, 9, 10, 19):
        array, label = source[index]
        assert (array.dtype, label.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(array, ARRAYS[index].astype(np.float32))
        assert label == index
    with pytest.raises(IndexError):
        source[20]


def test_through_the_pipeline(files):
    arrays, labels = next(pipeline.batches(latents.read(files), 8, threads=2))
    np.testing.assert_array_equal(arrays, ARRAYS[labels].astype(np.float32))


def test_files_that_are_not_that(tmp_path, files):
    with pytest.raises(FileNotFoundError, match="no files of latents"):
        latents.read([])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.array_record is not there"):
        latents.read([*files, tmp_path / "nowhere.array_record"])
    cut = tmp_path / "cut.array_record"
    cut.write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.array_record is not a whole file"):
        latents.read([cut])
    other = tmp_path / "other.array_record"
    writer = latents._package().ArrayRecordWriter(str(other), "group_size:1")
    writer.write(b"neither")
    writer.close()
    with pytest.raises(ValueError, match="Record 0 is not a label and an array of numpy"):
        latents.read([other])[0]
    writer = latents._package().ArrayRecordWriter(str(other), "group_size:1")
    content = io.BytesIO()
    np.save(content, np.array(["1", "2"]))
    writer.write(bytes(4) + content.getvalue())
    writer.close()
    with pytest.raises(ValueError, match=r"Record 0 is not a label and an array of numpy \(its dtype is <U1"):
        latents.read([other])[0]


@pytest.mark.parametrize(
    ("arrays", "labels", "error", "message"),
    [
        (ARRAYS[:2], [0, 3.7], TypeError, "Label 1 is 3.7; expected an integer"),
        (ARRAYS[:2], ["0", "1"], TypeError, "Label 0 is '0'; expected an integer"),
        (ARRAYS[:2], [0, 2**31], ValueError, "Label 1 is 2147483648; expected an integer of 32 bits"),
        ([ARRAYS[0] + 1j], [0], TypeError, "Array 0 has dtype complex64; expected real numbers"),
        ([np.array(["1", "2"])], [0], TypeError, "Array 0 has dtype <U1; expected real numbers"),
        ([np.array([None])], [0], TypeError, "Array 0 has dtype object; expected real numbers"),
        ([np.array([2**24 + 1])], [0], ValueError, "Array 0 has numbers that float32, as which it is read, has no room for"),
        ([np.array([2**63 + 1], np.uint64)], [0], ValueError, "Array 0 has numbers that float32, as which it is read, has no room for"),
        ([np.array([1e39])], [0], ValueError, "Array 0 has numbers that float32, as which it is read, has no room for"),
        (ARRAYS, range(3), ValueError, r"shorter|longer"),
    ],
)
def test_what_would_be_read_as_something_else_is_not_written(tmp_path, arrays, labels, error, message):
    file = tmp_path / "part.array_record"
    latents.write(file, ARRAYS[:3], [7, 8, 9])
    with pytest.raises(error, match=message):
        latents.write(file, arrays, labels)
    # Nor is what was there lost.
    assert [int(latents.read([file])[index][1]) for index in range(3)] == [7, 8, 9]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_source_that_dies_leaves_the_old_file(tmp_path):
    def source():
        yield ARRAYS[0]
        raise OSError("the disk of the images is gone")

    file = tmp_path / "part.array_record"
    latents.write(file, ARRAYS[:3], [7, 8, 9])
    with pytest.raises(OSError, match="is gone"):
        latents.write(file, source(), range(2))
    assert len(latents.read([file])) == 3
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_kinds_of_numbers(tmp_path):
    given = [np.array([True, False]), np.array([-3, 4], np.int64), np.array([0.5, np.nan], jnp.bfloat16), np.array([0.1, -np.inf])]
    latents.write(tmp_path / "part", given, [np.int64(1), np.uint8(2), True, 4])
    source = latents.read([tmp_path / "part"])
    for index, array in enumerate(given):
        np.testing.assert_array_equal(source[index][0], array.astype(np.float32), strict=True)
    assert [int(source[index][1]) for index in range(4)] == [1, 2, 1, 4]


def test_array_record_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(ImportError, match=r"array_record: pip install 'fmjax\[images\]'"):
        latents.read([tmp_path / "file"])
