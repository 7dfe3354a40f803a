"""Images resized as torch-fidelity, clean-fid, Pillow and guided-diffusion resize them."""

import sys

import jax
import numpy as np
import official
import PIL.Image
import pytest

from fmjax.data import resize
from fmjax.models import inception

_, ARRAYS = official.load("resize")
SIZES = range(4)
CROPS = range(5)


@pytest.mark.parametrize("i", SIZES)
def test_the_graphs_resizing_is_torch_fidelitys(i):
    wanted = ARRAYS[f"tensorflow_{i}"]
    found = jax.jit(inception.tensorflow_bilinear, static_argnums=1)(ARRAYS[f"images_{i}"], wanted.shape[1:3])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5)


def test_the_graphs_resizing_is_not_symmetric():
    """The first pixel is itself, and the last looks beyond the image's end: corners are aligned at the first alone."""
    row = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1)
    np.testing.assert_array_equal(inception.tensorflow_bilinear(row, (1, 8)).ravel(), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_array_equal(inception.tensorflow_bilinear(row, (1, 2)).ravel(), [0, 2])


@pytest.mark.parametrize("i", SIZES)
def test_clean_resizing_is_clean_fids(i):
    images, wanted = ARRAYS[f"images_{i}"], ARRAYS[f"clean_{i}"]
    found = resize.clean_bicubic(images, wanted.shape[1:3])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(resize.clean_bicubic(images.astype(np.float64), wanted.shape[1:3]), wanted)


@pytest.mark.parametrize("resample", ["BICUBIC", "BILINEAR", "LANCZOS", "BOX"])
@pytest.mark.parametrize("i", SIZES)
def test_pillows_resizing_is_that_of_whole_images(i, resample):
    images, resample = ARRAYS[f"images_{i}"], PIL.Image.Resampling[resample]
    height, width = ARRAYS[f"clean_{i}"].shape[1:3]
    wanted = [np.asarray(PIL.Image.fromarray(image).resize((width, height), resample)) for image in images]
    np.testing.assert_array_equal(resize.pillow(images, (height, width), resample), wanted, strict=True)


def test_grey_images_are_resized():
    images = ARRAYS["images_0"]
    coloured = resize.pillow(images, (6, 5), PIL.Image.Resampling.BOX)
    np.testing.assert_array_equal(resize.pillow(images[..., :1], (6, 5), PIL.Image.Resampling.BOX), coloured[..., :1])


@pytest.mark.parametrize("i", CROPS)
def test_the_square_in_the_middle_is_adms(i):
    wanted = ARRAYS[f"cropped_{i}"]
    np.testing.assert_array_equal(resize.adm_center_crop(ARRAYS[f"uncropped_{i}"], len(wanted)), wanted, strict=True)


BOX = PIL.Image.Resampling.BOX


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resize.pillow(np.zeros((4, 4, 3), np.uint8), (2, 2), BOX), ValueError, r"\(4, 4, 3\), .* image\[None\]"),
        (lambda: resize.pillow(np.zeros((1, 4, 4, 3)), (2, 2), BOX), TypeError, "dtype float64, but they are uint8"),
        (lambda: resize.clean_bicubic(np.zeros((1, 4, 4, 3), np.int64), (2, 2)), TypeError, r"int64, .* floats in \[0, 255\]"),
        (lambda: resize.clean_bicubic(np.zeros((1, 0, 4, 3)), (2, 2)), ValueError, r"\(1, 0, 4, 3\)"),
        (lambda: resize.adm_center_crop(np.zeros((1, 4, 4, 3), np.uint8), 2), ValueError, "one by one"),
        (lambda: resize.adm_center_crop(np.zeros((4, 4, 3)), 2), TypeError, "float64"),
        (lambda: inception.tensorflow_bilinear(np.zeros((4, 4, 3)), (2, 2)), ValueError, r"\(4, 4, 3\), .* image\[None\]"),
    ],
)
def test_other_arrays_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"fmjax\[images\]"):
        resize.pillow(np.zeros((1, 4, 4, 3), np.uint8), (2, 2), BOX)
