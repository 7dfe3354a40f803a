"""Images resized on the host as published Frechet distances have them, by Pillow, pixel by pixel what its own callers get.

Which resizing it is changes the distance (Parmar et al. 2022, arXiv:2104.11222): the reference and the samples have the same.

    ADM's references of ImageNet, which DiT and SiT compare with      `adm_center_crop`, then in the graph
    pytorch-fid's and torch-fidelity's FID                            in the graph: `models.inception.tensorflow_bilinear`
    clean-fid                                                         `clean_bicubic` to (299, 299), which the graph leaves as it is
    other networks' features, such as DINOv2's                        `pillow`, most often bicubic

Needs Pillow: `pip install fmjax[images]`.
"""

import numpy as np

__all__ = ["adm_center_crop", "clean_bicubic", "pillow"]


def _pillow():
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("data.resize needs Pillow: pip install 'fmjax[images]'") from error
    return PIL.Image


def _resize(images, size, resample):
    """Each channel by itself, in its dtype, uint8 or float32."""
    image = _pillow()
    height, width = size
    out = np.empty((len(images), height, width, images.shape[-1]), images.dtype)
    for i in range(len(images)):
        for c in range(images.shape[-1]):
            channel = image.fromarray(np.ascontiguousarray(images[i, ..., c]))
            out[i, ..., c] = np.asarray(channel.resize((width, height), resample))
    return out


def _batch(images, floats=False):
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}, but they are a batch (B, H, W, C): for one image give image[None].")
    if images.dtype != np.uint8 and not (floats and np.issubdtype(images.dtype, np.floating)):
        wanted = "uint8, or floats in [0, 255]" if floats else "uint8"
        raise TypeError(f"images have dtype {images.dtype}, but they are {wanted}: round those in [0, 255] and cast them.")
    return images


def pillow(images, size, resample) -> np.ndarray:
    """What Pillow's `Image.resize` makes of images: smoothed where they become smaller, and rounded.

    Args:
      images: (B, H, W, C), uint8.
      size: (height, width) of the result; Pillow itself takes the width first.
      resample: Pillow's filter, such as PIL.Image.Resampling.BICUBIC.
    Returns:
      (B, height, width, C), uint8.
    Raises:
      ImportError: if Pillow is not installed (`pip install fmjax[images]`).
      TypeError: if the images are not uint8.
      ValueError: if they are no such batch.
    """
    return _resize(_batch(images), size, resample)


def clean_bicubic(images, size) -> np.ndarray:
    """Bicubic resizing without rounding, as clean-fid has it: smoothed where images become smaller, cut to [0, 255].

    (Parmar et al. 2022, arXiv:2104.11222)

    Args:
      images: (B, H, W, C), uint8, or floats in [0, 255].
      size: (height, width) of the result, (299, 299) for the FID.
    Returns:
      (B, height, width, C), float32 in [0, 255].
    Raises:
      ImportError: if Pillow is not installed (`pip install fmjax[images]`).
      TypeError: if the images are neither uint8 nor floats.
      ValueError: if they are no such batch.
    """
    images = _batch(images, floats=True).astype(np.float32)
    return np.clip(_resize(images, size, _pillow().Resampling.BICUBIC), 0, 255)


def adm_center_crop(image, size) -> np.ndarray:
    """The square in the middle of an image, as ADM, DiT and SiT train on it and their references of ImageNet have it.

    While the smaller side is at least twice the size, both are halved, by averages; then it becomes the size, bicubic; then the middle
    of the larger side is cut out.    (Dhariwal and Nichol 2021, arXiv:2105.05233)

    Args:
      image: (H, W, C), uint8; images of a dataset differ in size, so it is one.
      size: the side of the result.
    Returns:
      (size, size, C), uint8.
    Raises:
      ImportError: if Pillow is not installed (`pip install fmjax[images]`).
      TypeError: if the image is not uint8.
      ValueError: if it is no such array.
    """
    image, filters = np.asarray(image), _pillow().Resampling
    if image.ndim != 3:
        raise ValueError(f"image has shape {image.shape}, but it is one image, (H, W, C): crop the images of a batch one by one.")
    images = _batch(image[None])
    while min(images.shape[1:3]) >= 2 * size:
        images = _resize(images, [side // 2 for side in images.shape[1:3]], filters.BOX)
    ratio = size / min(images.shape[1:3])
    images = _resize(images, [round(side * ratio) for side in images.shape[1:3]], filters.BICUBIC)
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[0, top : top + size, left : left + size]
