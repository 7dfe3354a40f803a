"""Image data: Fashion-MNIST's files and their damage, sources, and batches that keep their order through a stop."""

import contextlib
import gzip
import hashlib
import json
import math
import os
import pickle
import sys
import tracemalloc
import urllib.error
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmjax.data import fashion_mnist, images, pipeline

TRAIN, TEST = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"
RNG = np.random.default_rng(0)
few = settings(max_examples=25, deadline=None)
# Grain's permutation costs some 50 ms an epoch on a small source.
fewer = settings(max_examples=8, deadline=None)


def idx(array):
    header = [0x0800 + array.ndim, *array.shape]
    return np.array(header, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def random_pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_fashion(folder, n=(6, 4), packed=True):
    """Small files in the form of the real ones, as a dictionary of their arrays."""
    arrays = {}
    for part, count in zip(("train", "t10k"), n, strict=True):
        arrays[f"{part}-images-idx3-ubyte"] = random_pixels(count, 28, 28)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, array in arrays.items():
        content = idx(array)
        (folder / f"{name}.gz" if packed else folder / name).write_bytes(gzip.compress(content) if packed else content)
    return arrays


def assert_fashion(loaded, arrays):
    for (pixels, labels), part in zip(loaded, ("train", "t10k"), strict=True):
        assert pixels.dtype == np.float32
        assert labels.dtype == np.int32
        np.testing.assert_allclose(127.5 * (pixels + 1), arrays[f"{part}-images-idx3-ubyte"][..., None], atol=1e-4)
        np.testing.assert_array_equal(labels, arrays[f"{part}-labels-idx1-ubyte"])


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path, packed):
    arrays = write_fashion(tmp_path, packed=packed)
    assert_fashion(fashion_mnist.load(tmp_path), arrays)
    assert_fashion(fashion_mnist.load(str(tmp_path)), arrays)
    assert len(fashion_mnist.NAMES) == fashion_mnist.CLASSES == 10


def test_fashion_mnist_of_debian(tmp_path, monkeypatch):
    real = fashion_mnist.DEBIAN
    arrays = write_fashion(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    assert_fashion(fashion_mnist.load(), arrays)
    # The package's own files, where it is installed.
    if real.is_dir():
        for part, count in (("train", 60_000), ("t10k", 10_000)):
            assert fashion_mnist.read_idx(real / f"{part}-images-idx3-ubyte.gz", 3).shape == (count, 28, 28)
            labels = fashion_mnist.read_idx(real / f"{part}-labels-idx1-ubyte.gz", 1)
            np.testing.assert_array_equal(np.bincount(labels), [count // 10] * 10)
            # But for the name and the time in its header, each file is the published one.
            name = f"{part}-labels-idx1-ubyte"
            time = {"train": 0x59A7E9DE, "t10k": 0x59A7E9F3}[part].to_bytes(4, "little")
            packed = (real / f"{name}.gz").read_bytes()
            published = packed[:3] + b"\x08" + time + packed[8:10] + name.encode() + b"\0" + packed[10:]
            assert hashlib.sha256(published).hexdigest() == fashion_mnist.FILES[f"{name}.gz"]


@few
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), data=st.data())
def test_idx(tmp_path_factory, shape, data):
    file = tmp_path_factory.mktemp("idx") / "array"
    array = random_pixels(*shape)
    file.write_bytes(idx(array))
    np.testing.assert_array_equal(fashion_mnist.read_idx(file, len(shape)), array, strict=True)
    # Cut anywhere, or with bytes left over, it is not read.
    content = idx(array)
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="expected"):
        fashion_mnist.read_idx(file, len(shape))
    file.write_bytes(content + bytes(data.draw(st.integers(1, 9))))
    with pytest.raises(ValueError, match=f"{file}.*expected {math.prod(shape)}, of shape"):
        fashion_mnist.read_idx(file, len(shape))


@few
@given(data=st.data())
def test_damaged_gzip(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("idx") / "array.gz"
    array = np.arange(75, dtype=np.uint8).reshape(3, 5, 5)
    content = bytearray(gzip.compress(idx(array), mtime=0))
    file.write_bytes(content[: data.draw(st.integers(1, len(content) - 1))])
    with pytest.raises(ValueError, match=rf"{file}.*expected"):
        fashion_mnist.read_idx(file, 3)
    content[data.draw(st.integers(10, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    # A few bits mean nothing, between the last block and the checksum: then the array is the same.
    with contextlib.suppress(ValueError):
        np.testing.assert_array_equal(fashion_mnist.read_idx(file, 3), array)


def replaced(name, array):
    return lambda folder: (folder / name).write_bytes(gzip.compress(idx(array)))


DAMAGE = {
    "labels for images": (replaced(TRAIN, np.zeros(6)), ValueError, r"train-images.*starts with 0x00000801; expected 0x00000803"),
    "images for labels": (replaced("t10k-labels-idx1-ubyte.gz", np.zeros((4, 1, 1))), ValueError, r"0x00000803; expected 0x00000801"),
    "other size": (replaced(TEST, np.zeros((4, 32, 32))), ValueError, r"t10k-images.*\(32, 32\) pixels; expected \(28, 28\)"),
    "fewer labels": (replaced("train-labels-idx1-ubyte.gz", np.zeros(5)), ValueError, r"6 images and .*train-labels.* 5 labels"),
    "label": (
        replaced("train-labels-idx1-ubyte.gz", np.arange(5, 11)),
        ValueError,
        r"train-labels.*the label 10; expected labels below 10",
    ),
    "missing": (lambda folder: (folder / TEST).unlink(), FileNotFoundError, r"neither t10k-images-idx3-ubyte.gz nor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_fashion_mnist_that_is_not(tmp_path, damage):
    break_it, error, match = DAMAGE[damage]
    write_fashion(tmp_path)
    break_it(tmp_path)
    with pytest.raises(error, match=match):
        fashion_mnist.load(tmp_path)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder that stands for the authors' address, an empty cache, and no package."""
    folder = tmp_path / "published"
    folder.mkdir()
    arrays = write_fashion(folder)
    monkeypatch.setattr(fashion_mnist, "ADDRESS", folder.as_uri() + "/")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "FILES", {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder, tmp_path / "cache" / "fmjax" / "fashion-mnist", arrays


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def test_download_once(published, monkeypatch):
    _, cache, arrays = published
    assert_fashion(fashion_mnist.load(), arrays)
    assert {file.name for file in cache.iterdir()} == set(fashion_mnist.FILES)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert_fashion(fashion_mnist.load(), arrays)


def test_download_of_other_bytes_is_not_kept(published):
    folder, cache, _ = published
    (folder / TEST).write_bytes(b"not it")
    with pytest.raises(ValueError, match=rf"{TEST} has the SHA-256 {hashlib.sha256(b'not it').hexdigest()}; expected"):
        fashion_mnist.load()
    assert not (cache / TEST).exists()
    assert {file.name for file in cache.iterdir()} < set(fashion_mnist.FILES)


def test_offline(published, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(ConnectionError, match=rf"{fashion_mnist.ADDRESS}.*no network.*load\(folder\).*apt install dataset-fashion-mnist"):
        fashion_mnist.load()


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def photos(tmp_path):
    """Two classes of four images, one of them in a folder within, with their pixels in order."""
    files = ["ant/a.png", "ant/b.BMP", "ant/within/c.webp", "ant/within/d.Png", "bee/a.png", "bee/b.png", "bee/c.png", "bee/d.png"]
    pixels = [save(tmp_path / "photos" / f, random_pixels(8, 8, 3), **({"lossless": True} if f.endswith("webp") else {})) for f in files]
    (tmp_path / "photos" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / "ant" / "._a.png").write_text("hidden")
    (tmp_path / "photos" / ".hidden").mkdir()
    save(tmp_path / "photos" / "ant" / ".thumbnails" / "a.png", random_pixels(8, 8, 3))
    (tmp_path / "photos" / "bee" / "folder.png").mkdir()
    return tmp_path / "photos", np.stack(pixels)


def test_folder(photos):
    root, pixels = photos
    source = images.folder(root, size=8)
    assert len(source) == 8
    assert source.classes == ("ant", "bee")
    assert source.broken == ()
    found, labels = zip(*source, strict=True)
    np.testing.assert_array_equal(np.stack(found), images.scale(pixels))
    assert found[0].dtype == np.float32
    assert {label.dtype for label in labels} == {np.dtype(np.int32)}
    assert list(labels) == [0] * 4 + [1] * 4
    np.testing.assert_array_equal(source[np.int64(3)][0], found[3])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[5][0], found[5])
    for index in (8, -1):
        with pytest.raises(IndexError, match=rf"{index}; expected one in \[0, 8\)"):
            source[index]
    with pytest.raises(TypeError):
        source[1.0]


def test_folder_of_one_class(tmp_path):
    pixels = save(tmp_path / "sky" / "a.png", random_pixels(8, 8, 3))
    source = images.folder(str(tmp_path / "sky"), size=8)
    assert source.classes == ("sky",)
    np.testing.assert_array_equal(source[0][0], images.scale(pixels))
    assert source[0][1] == 0


def test_folder_errors(photos):
    root, pixels = photos
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        images.folder(root / "nowhere", size=8)
    (root / "cow").mkdir()
    for empty in (root, root / "cow"):
        with pytest.raises(ValueError, match=r"cow has no images; expected files that end in \.bmp"):
            images.folder(empty, size=8)
    (root / "cow").rmdir()
    save(root / "stray.png", pixels[0])
    with pytest.raises(ValueError, match=r"images \(stray.png\) beside its folders \(ant\)"):
        images.folder(root, size=8)
    for wrong in ({"size": 0}, {"size": 8, "channels": 2}):
        with pytest.raises(ValueError, match="expected a size of at least 1, and 1 or 3 channels"):
            images.folder(root, **wrong)


def test_broken_images(photos):
    root, pixels = photos
    (root / "ant" / "b.BMP").write_bytes(b"nothing")
    content = (root / "bee" / "c.png").read_bytes()
    (root / "bee" / "c.png").write_bytes(content[: len(content) // 2])
    source = images.folder(root, size=8)
    source[0]
    for index, name in ((1, "b.BMP"), (6, "c.png")):
        with pytest.raises(ValueError, match=rf"{name} cannot be decoded.*skip_broken"):
            source[index]
    # Through the pipeline the error still names the file.
    with pytest.raises(ValueError, match=r"b\.BMP cannot be decoded"):
        list(pipeline.batches(source, 8, epochs=1))
    with pytest.warns(UserWarning, match=r"2 of 8 images cannot be decoded, and are left out: .*b\.BMP, .*c\.png") as seen:
        source = images.folder(root, size=8, skip_broken=True)
    assert len(seen) == 1
    assert [Path(file).name for file in source.broken] == ["b.BMP", "c.png"]
    np.testing.assert_array_equal(np.stack([x for x, _ in source]), images.scale(pixels[[0, 2, 3, 4, 5, 7]]))
    assert [label for _, label in source] == [0, 0, 0, 1, 1, 1]


def test_all_broken(tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 12 images"):
        images.folder(tmp_path, size=8, skip_broken=True)
    save(tmp_path / "good.png", random_pixels(8, 8, 3))
    with pytest.warns(UserWarning, match=r"12 of 13 images .*, \.\.\.$"):
        assert len(images.folder(tmp_path, size=8, skip_broken=True).broken) == 12


def test_sound_images_do_not_warn(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.folder(photos[0], size=8, skip_broken=True).broken == ()


@few
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 20),
    channels=st.sampled_from([1, 3]),
    given_channels=st.sampled_from([(), (1,), (3,), (4,)]),
)
def test_any_image_comes_out_square(height, width, size, channels, given_channels):
    pixels = random_pixels(height, width, *given_channels)
    source = images.records([{"image": pixels, "label": 3}], size=size, channels=channels)
    found, label = source[0]
    assert found.shape == (size, size, channels)
    assert found.dtype == np.float32
    assert np.abs(found).max() <= 1
    assert label == 3
    if height == width == size and given_channels in ((), (1,)):
        np.testing.assert_array_equal(found, np.broadcast_to(images.scale(pixels).reshape(size, size, 1), found.shape))


@few
@given(size=st.integers(2, 10), factor=st.integers(1, 5), extra=st.integers(0, 30), tall=st.booleans())
def test_the_middle_is_kept(size, factor, extra, tall):
    # A black square between white margins: only the square is seen.
    side = size * factor
    pixels = np.full((side, side + 2 * extra), 255, np.uint8)
    pixels[:, extra : extra + side] = 0
    source = images.records([{"image": pixels.T if tall else pixels}], size=size, label=None)
    found, label = source[0]
    np.testing.assert_array_equal(found, np.full((size, size, 3), -1, np.float32))
    assert label == 0


def test_formats_of_files(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    save(tmp_path / "16bit.png", grey.astype(np.uint16) * 257)
    Image.fromarray(grey).rotate(90).save(tmp_path / "exif.png", exif=orientation(6))
    Image.fromarray(grey).save(tmp_path / "grey.gif")
    Image.fromarray(random_pixels(90, 60, 3)).save(tmp_path / "z.jpg")
    source = images.folder(tmp_path, size=8, channels=1)
    for index in range(3):
        np.testing.assert_array_equal(source[index][0], images.scale(grey)[..., None])
    assert source[3][0].shape == (8, 8, 1)


def test_what_only_looks_like_an_image(tmp_path):
    """A format that runs another program, a pipe that never ends, a device, a link to nowhere; and a photograph in two parts is one."""
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere")
    first, second = (Image.fromarray(random_pixels(8, 8, 3)) for _ in range(2))
    first.save(tmp_path / "e.jpg", format="MPO", save_all=True, append_images=[second])
    source = images.folder(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded: cannot identify image file"):
        source[0]
    for index, name in ((1, "b"), (2, "c"), (3, "d")):
        with pytest.raises(ValueError, match=rf"{name}\.png is no file of its own"):
            source[index]
    assert source[4][0].shape == (8, 8, 3)
    with pytest.warns(UserWarning, match="4 of 5 images cannot be decoded"):
        assert len(images.folder(tmp_path, size=8, skip_broken=True)) == 1
    with pytest.raises(TypeError, match="pixels have dtype float64; expected uint8"):
        images.scale(np.ones((2, 2)))


def test_a_small_file_that_unpacks_to_a_large_one(tmp_path):
    """A header of 300 pixels before 256 MB: no more is unpacked than belongs there. And a header that claims too much."""
    content = gzip.compress(idx(np.zeros((300, 1, 1))))
    with gzip.open(tmp_path / "bomb.gz", "wb", 1) as bomb:
        bomb.write(gzip.decompress(content))
        for _ in range(64):
            bomb.write(bytes(2**22))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.gz has more after its header; expected 300"):
        fashion_mnist.read_idx(tmp_path / "bomb.gz", 3)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    (tmp_path / "claim").write_bytes(np.array([0x0803, 2**31, 2**31, 2**31], ">u4").tobytes())
    with pytest.raises(ValueError, match=r"claim has the shape \(2147483648, .* in its header; expected at most"):
        fashion_mnist.read_idx(tmp_path / "claim", 3)


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


class DataSource:
    """Indexes as `tfds.data_source` does: length, and mappings of numpy values."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"id": b"x", "image": self.pixels[index], "label": np.int64(index % 3)}


def test_records_of_tfds():
    pixels = random_pixels(5, 8, 8, 1)
    source = images.records(DataSource(pixels), size=8, channels=1)
    assert len(source) == 5
    np.testing.assert_array_equal(np.stack([x for x, _ in source]), images.scale(pixels))
    assert [label for _, label in source] == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[4][0], source[4][0])


def test_records_of_hugging_face():
    import datasets

    pixels = random_pixels(7, 8, 8, 3)
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])})
    held = datasets.Dataset.from_dict({"img": [Image.fromarray(p) for p in pixels], "fine": [0, 1, 0, 1, 0, 1, 1]}, features=features)
    for form in (held, held.with_format("numpy")):
        source = images.records(form, size=8, image="img", label="fine")
        np.testing.assert_array_equal(np.stack([x for x, _ in source]), images.scale(pixels))
        assert [label for _, label in source] == [0, 1, 0, 1, 0, 1, 1]
    found, labels = next(pipeline.batches(source, 7, shuffle=False))
    np.testing.assert_array_equal(found, images.scale(pixels))
    np.testing.assert_array_equal(labels, [0, 1, 0, 1, 0, 1, 1])


GOOD = random_pixels(8, 8)
RECORDS = {
    "image key": ({"img": GOOD, "label": 0}, KeyError, "Record 0 has no 'image'; expected one of its keys, 'img', 'label'"),
    "label key": ({"image": GOOD, "fine": 0}, KeyError, "no 'label'.*'image', 'fine'"),
    "floats": ({"image": GOOD / 255, "label": 0}, TypeError, "an array of float64 as 'image'; expected"),
    "bytes": ({"image": b"png", "label": 0}, TypeError, "a bytes as 'image'; expected"),
    "shape": ({"image": random_pixels(8, 8, 2), "label": 0}, ValueError, r"shape \(8, 8, 2\); expected"),
    "no pixels": ({"image": random_pixels(0, 8), "label": 0}, ValueError, r"shape \(0, 8\); expected"),
    "mode": ({"image": Image.new("F", (8, 8)), "label": 0}, ValueError, "the mode F.*convert it"),
    "name": ({"image": GOOD, "label": "cat"}, TypeError, "'cat' as 'label'; expected an integer"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_not(name):
    record, error, match = RECORDS[name]
    with pytest.raises(error, match=match):
        images.records([record], size=8)[0]


def test_arrays():
    source = images.arrays(np.ones((3, 2, 2, 1), np.float32), np.arange(3, dtype=np.int32))
    assert [label for _, label in source] == [0, 1, 2]
    assert source.read.func.__name__ not in repr(source)
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        images.arrays(np.ones(3), np.ones(2))


def numbers(n):
    """A source of n numbers as images, and again as labels."""
    return images.arrays(np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), np.arange(n, dtype=np.int32))


def drawn(iterator):
    """The numbers of the batches, (batches, size)."""
    return np.stack([np.asarray(labels) for _, labels in iterator])


@contextlib.contextmanager
def opened(*args, **kwargs):
    iterator = pipeline.batches(*args, **kwargs)
    yield iterator
    iterator.close()


@fewer
@given(n=st.integers(4, 40), size=st.integers(1, 4), seed=st.integers(0, 2**31), threads=st.sampled_from([0, 3]))
def test_each_epoch_is_a_permutation(n, size, seed, threads):
    with opened(numbers(n), size, seed=seed, epochs=2, threads=threads) as iterator:
        order = drawn(iterator)
    epochs = order.reshape(2, -1)
    assert epochs.shape == (2, n // size * size)
    for epoch in epochs:
        assert len(set(epoch) & set(range(n))) == n // size * size
    with opened(numbers(n), size, seed=seed, threads=0) as again:
        np.testing.assert_array_equal(order, drawn(next(again) for _ in range(len(order))))


def test_orders_differ_between_epochs_and_seeds():
    first, second = drawn(pipeline.batches(numbers(64), 16, epochs=2, threads=0)).reshape(2, 64)
    other = drawn(pipeline.batches(numbers(64), 16, epochs=1, seed=1, threads=0)).reshape(64)
    orders = {tuple(first), tuple(second), tuple(other), tuple(range(64))}
    assert len(orders) == 4
    plain = drawn(pipeline.batches(numbers(64), 16, epochs=2, shuffle=False, threads=0)).reshape(2, 64)
    np.testing.assert_array_equal(plain, [np.arange(64)] * 2)


def test_a_batch():
    source = numbers(8)
    found, labels = next(pipeline.batches(source, 4))
    assert isinstance(found, np.ndarray)
    assert found.shape == (4, 1, 1, 1)
    assert (found.dtype, labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(found[:, 0, 0, 0], labels)


@fewer
@given(n=st.integers(8, 50), count=st.sampled_from([2, 4]), part=st.integers(1, 2), epochs=st.integers(1, 2))
def test_processes_share_each_batch(n, count, part, epochs):
    size = count * part
    whole = drawn(pipeline.batches(numbers(n), size, epochs=epochs, threads=0))
    parts = [
        drawn(pipeline.batches(numbers(n), size, epochs=epochs, threads=0, process_index=index, process_count=count))
        for index in range(count)
    ]
    # One after another, the batches of a single process.
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(
    ("size", "options", "match"),
    [
        (6, {"process_index": 0, "process_count": 4}, "size is 6; expected a positive multiple of the 4 processes"),
        (0, {}, "size is 0; expected a positive multiple"),
        (9, {}, "size is 9; expected at most the 8 examples"),
        (4, {"process_index": 2, "process_count": 2}, r"process_index is 2; expected one in \[0, 2\)"),
        (4, {"epochs": 0}, "positive"),
    ],
)
def test_batches_that_cannot_be(size, options, match):
    with pytest.raises(ValueError, match=match):
        pipeline.batches(numbers(8), size, **options)


@fewer
@given(taken=st.integers(0, 8), ahead=st.integers(0, 4), threads=st.sampled_from([0, 2]))
def test_resumed(taken, ahead, threads):
    # Two epochs of four batches each, and an example left out. Restored, the rest is as it would have been.
    def stream():
        return pipeline.to_device(pipeline.batches(numbers(13), 3, epochs=2, threads=threads), prefetch=ahead)

    whole = list(stream())
    assert len(whole) == 8
    first, other = stream(), stream()
    for expected in whole[:taken]:
        assert_equal(next(first), expected)
    state = json.loads(json.dumps(first.get_state()))
    # Neither a fresh stream nor one with batches on their way matters.
    next(other)
    other.set_state(state)
    assert other.get_state() == state
    rest = list(other)
    assert len(rest) == 8 - taken
    for batch, again, expected in zip(rest, first, whole[taken:], strict=True):
        assert_equal(batch, expected)
        assert_equal(again, expected)
    # Without the device, by grain's own state.
    plain = pipeline.batches(numbers(13), 3, epochs=2)
    plain.set_state(state)
    for batch, expected in zip(plain, whole[taken:], strict=True):
        assert_equal(batch, expected)


def assert_equal(batch, expected):
    for part, other in zip(batch, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(other), strict=True)


@few
@given(n=st.integers(0, 9), ahead=st.integers(0, 12))
def test_to_device_keeps_the_order(n, ahead):
    read = []

    def give():
        for number in range(n):
            read.append(number)
            yield {"x": np.full(2, number, np.float32)}

    stream = pipeline.to_device(give(), prefetch=ahead)
    assert read == []
    for number in range(n):
        batch = next(stream)
        assert isinstance(batch["x"], jax.Array)
        np.testing.assert_array_equal(batch["x"], [number] * 2)
        assert len(read) == min(n, number + 1 + ahead)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(stream)


def test_a_state_of_other_batches():
    source = images.arrays(np.arange(40), np.arange(40))
    state = json.loads(json.dumps(pipeline.batches(source, 4, seed=1, threads=0).get_state()))
    pipeline.batches(source, 4, seed=1, threads=2, process_index=1, process_count=2).set_state(state)
    for options, match in (
        ({"size": 8, "seed": 1}, "with size 4; expected size 8"),
        ({"size": 4}, "with seed 1; expected seed 0"),
        ({"size": 4, "seed": 1, "shuffle": False}, "with shuffle True; expected shuffle False"),
    ):
        with pytest.raises(ValueError, match=match):
            pipeline.batches(source, options.pop("size"), threads=0, **options).set_state(state)


def test_to_device_of_what_has_no_state():
    assert not hasattr(pipeline.to_device([np.ones(1)]), "get_state")
    with pytest.raises(ValueError, match="prefetch is -1; expected 0 or more"):
        pipeline.to_device([], prefetch=-1)


def test_a_broken_batch_leaves_the_state():
    class Breaks:
        n = 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.n == 2:
                raise OSError("disc")
            self.n += 1
            return np.float32(self.n)

        def get_state(self):
            return self.n

    stream = pipeline.to_device(Breaks(), prefetch=1)
    assert next(stream) == 1
    with pytest.raises(OSError, match="disc"):
        next(stream)
    assert stream.get_state() == 1


def test_sharded_batches():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    expected = drawn(pipeline.batches(numbers(32), 16, epochs=1))
    stream = pipeline.to_device(pipeline.batches(numbers(32), 16, epochs=1), sharding=sharding)
    for (found, labels), order in zip(stream, expected, strict=True):
        assert found.shape == (16, 1, 1, 1)
        assert found.sharding.is_equivalent_to(sharding, 4)
        assert len(labels.addressable_shards) == 8
        np.testing.assert_array_equal(labels, order)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"grain: pip install 'fmjax\[images\]'"):
        pipeline.batches(numbers(4), 2)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for make in (lambda: images.folder(".", size=8), lambda: images.records([], size=8)):
        with pytest.raises(ImportError, match=r"Pillow: pip install 'fmjax\[images\]'"):
            make()


def test_split_holds_out_examples_of_all_kinds():
    """No example stands on both sides, none is lost, and a source in order of its labels is held out in no order."""
    x, y = np.arange(40.0, dtype=np.float32).reshape(40, 1, 1, 1), np.repeat(np.arange(4, dtype=np.int32), 10)
    rest, held = pipeline.split(images.arrays(x, y), 12, seed=1)
    assert (len(rest), len(held)) == (28, 12)
    sides = [[float(side[i][0].item()) for i in range(len(side))] for side in (rest, held)]
    assert sorted(sides[0] + sides[1]) == list(range(40))
    assert len({int(held[i][1]) for i in range(12)}) == 4
    assert sides[1] == [float(pipeline.split(images.arrays(x, y), 12, seed=1)[1][i][0].item()) for i in range(12)]
    batch, _ = next(pipeline.batches(held, 12, shuffle=False, threads=0))
    assert sorted(batch.ravel().tolist()) == sorted(sides[1])
    for count in (0, 40):
        with pytest.raises(ValueError, match=rf"count is {count}; expected at least 1 and fewer than the 40"):
            pipeline.split(images.arrays(x, y), count)
