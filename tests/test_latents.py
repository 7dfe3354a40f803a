"""Latents to files of array_record and back, through the pipeline too; and what is said of files that are not that."""

import pickle
import sys

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
    with pytest.raises(ValueError, match=r"shorter|longer"):
        latents.write(tmp_path / "uneven.array_record", ARRAYS, range(3))


def test_array_record_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(ImportError, match=r"array_record: pip install 'fmjax\[images\]'"):
        latents.read([tmp_path / "file"])
