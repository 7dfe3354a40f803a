"""ADM, its classifiers, torchcfm's networks and EDM's ADM, from the tensors of their checkpoints."""

from fmjax import betas, paths, targets
from fmjax.models import conditions, unet
from fmjax.pretrained import layouts, unets
from fmjax.pretrained.published import Published, discrete_time, given_time

_ADM = {64: unets.ADM_64, 128: unets.ADM_128, 256: unets.ADM_256, 512: unets.ADM_512}
_CLASSIFIERS = {64: unets.ADM_classifier_64, 128: unets.ADM_classifier_128, 256: unets.ADM_classifier_256, 512: unets.ADM_classifier_512}
_EDM = targets.edm(0.5)


def adm(tensors, image_size=256, *, model=None, new_attention_order=None) -> Published:
    """ADM from the tensors of its checkpoint, such as 256x256_diffusion.pt: noise, and a variance, in 1,000 discrete steps.

    Those of LSUN and the unconditional one of ImageNet, at 256 pixels, are found by what their files lack. Dhariwal and Nichol 2021,
    arXiv:2105.05233.

    Args:
      tensors: arrays by name: `read("256x256_diffusion.pt")`.
      image_size: 64, 128, 256 or 512; betas are a cosine's at 64, and linear at the others.
      model: a `models.unet.UNet`, where the size is no published one.
      new_attention_order: whether it was trained with that flag, which no tensor shows; None is as was published, at 64 pixels alone.
    Returns:
      A `Published` of images (H, W, 3) in [-1, 1] and labels 0 to 999, of which none stands for no class.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite, or the size is none of these.
    """
    layouts.require_tensors(tensors)
    if model is None:
        model = _of(_ADM, image_size)()
        if "label_emb.weight" not in tensors:
            model = unets.ADM_256_unconditional() if image_size == 256 else model.clone(condition=None)
    params = unets.adm_params(tensors, model, new_attention_order)
    path = betas.cosine() if image_size == 64 else betas.linear()
    return Published(params, path, model, targets.noise, discrete_time, (image_size, image_size, 3), variance=model.learn_sigma)


def adm_classifier(tensors, image_size=256, *, model=None) -> Published:
    """ADM's classifier of noisy images: `predict(x, t)` gives its logits, for `guidance.classifier`.

    Args:
      tensors: arrays by name: `read("256x256_classifier.pt")`.
      image_size: 64, 128, 256 or 512, along the path of `adm` of this size.
      model: a `models.unet.Classifier`, where the size is no published one.
    Returns:
      A `Published` without a velocity.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite, or the size is none of these.
    """
    layouts.require_tensors(tensors)
    model = _of(_CLASSIFIERS, image_size)() if model is None else model
    path = betas.cosine() if image_size == 64 else betas.linear()
    params = unets.adm_classifier_params(tensors, model)
    return Published(params, path, model, None, discrete_time, (image_size, image_size, 3))


def torchcfm(tensors, *, model=None) -> Published:
    """torchcfm's network for CIFAR-10 or MNIST from the tensors of its checkpoint: the velocity of the linear path.

    Tong et al. 2024, arXiv:2302.00482.

    Args:
      tensors: arrays by name: `read("otcfm_cifar10_weights_step_400000.pt", "ema_model")`.
      model: a `models.unet.UNet`, where the size is none of theirs.
    Returns:
      A `Published` of images (32, 32, 3) in [-1, 1], or (28, 28, 1) and labels 0 to 9.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite.
    """
    layouts.require_tensors(tensors)
    grey = any(name.endswith("label_emb.weight") for name in tensors)
    size = (28, 28, 1) if grey else (32, 32, 3)
    if model is None:
        model = unets.TORCHCFM_MNIST(condition=conditions.Label(10, null_label=False)) if grey else unets.TORCHCFM_CIFAR10()
    return Published(unets.torchcfm_params(tensors, model), paths.Linear(), model, targets.velocity, given_time, size)


def edm_adm(tensors, *, model=None) -> Published:
    """EDM's ADM for ImageNet at 64 pixels from the tensors of its checkpoint, with its preconditioning, along the linear path.

    Along any path of the same noise levels it is the same network: `dataclasses.replace(network, path=paths.Cosine())`. It knows noise
    levels from 0.002 to 80: `times.karras` has such a grid. Karras et al. 2022, arXiv:2206.00364.

    Args:
      tensors: arrays by name: `read("edm-imagenet-64x64-cond-adm.pkl", "ema")`; its code in that file is not run.
      model: a `models.unet.UNet`, where the size is no published one.
    Returns:
      A `Published` of images (64, 64, 3) in [-1, 1] and labels 0 to 999, of which none stands for no class.
    Raises:
      TypeError: if the tensors are not arrays by name.
      ValueError: if a tensor is missing, unknown, of another shape or not finite.
    """
    layouts.require_tensors(tensors)
    model = unets.EDM_ADM_64() if model is None else model
    params = unets.edm_adm_params(tensors, model)
    return Published(params, paths.Linear(), model, _EDM, targets.c_noise, (64, 64, 3), sigma_data=0.5)


def _of(sizes, image_size) -> type[unet.UNet]:
    if image_size not in sizes:
        raise ValueError(f"image_size is {image_size!r}, but published sizes are {', '.join(map(str, sizes))}: give a model for others.")
    return sizes[image_size]
