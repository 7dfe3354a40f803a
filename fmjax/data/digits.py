"""Digits: 1,797 real handwritten digits of 8 x 8 pixels, which scikit-learn carries (Alpaydin and Kaynak 1998)."""

import numpy as np

__all__ = ["load", "CLASSES"]

CLASSES = 10
"""How many classes there are."""


def load(held_out=0.2, seed=0) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits, split at random with the same share of every class.

    Args:
      held_out: the share kept from training, in (0, 1).
      seed: of the split.
    Returns:
      `(images, labels)` for training and `(images, labels)` held out: images (N, 8, 8, 1), float32 in [-1, 1], and
      labels (N,), int32 in [0, 10).
    Raises:
      ImportError: if scikit-learn is not installed (`pip install fmjax[data]`).
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("data.digits needs scikit-learn: pip install 'fmjax[data]'") from error
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (pixels.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    labels = labels.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])
