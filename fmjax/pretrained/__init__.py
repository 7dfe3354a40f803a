"""Published networks: files of PyTorch read without PyTorch, and their tensors as the parameters of this library's networks.

    tensors = pretrained.read("SiT-XL-2-256x256.pt")
    network = pretrained.sit(tensors)
    guided = guidance.classifier_free(network.velocity, y, 1000, 4.0, combine=guidance.channels(3))
    latents, _ = sampling.sample_ode(guided, x_0, times.uniform_grid(50))

A file that holds anything but tensors and containers is refused, and nothing in it runs. Each tensor is used exactly once, or the call says
which is missing, unknown or of another shape.
"""

from fmjax.pretrained.adms import adm, adm_classifier, edm_adm, torchcfm
from fmjax.pretrained.autoencoders import autoencoder, autoencoder_tensors
from fmjax.pretrained.dinos import dinov2
from fmjax.pretrained.inceptions import inception
from fmjax.pretrained.published import Published
from fmjax.pretrained.tensors import Tensors, UnsafeFile, read, write
from fmjax.pretrained.transformers import dit, jit, sit, sit_metadata, sit_tensors
from fmjax.pretrained.unets import (
    ADM_64,
    ADM_128,
    ADM_256,
    ADM_512,
    ADM_LSUN,
    EDM_ADM_64,
    TORCHCFM_CIFAR10,
    TORCHCFM_MNIST,
    ADM_64_to_256,
    ADM_128_to_512,
    ADM_256_unconditional,
    ADM_classifier_64,
    ADM_classifier_128,
    ADM_classifier_256,
    ADM_classifier_512,
)

__all__ = [
    "read",
    "write",
    "Tensors",
    "UnsafeFile",
    "Published",
    "dit",
    "sit",
    "sit_tensors",
    "sit_metadata",
    "jit",
    "adm",
    "adm_classifier",
    "torchcfm",
    "edm_adm",
    "autoencoder",
    "autoencoder_tensors",
    "inception",
    "dinov2",
    "ADM_64",
    "ADM_128",
    "ADM_256",
    "ADM_256_unconditional",
    "ADM_512",
    "ADM_LSUN",
    "ADM_64_to_256",
    "ADM_128_to_512",
    "ADM_classifier_64",
    "ADM_classifier_128",
    "ADM_classifier_256",
    "ADM_classifier_512",
    "TORCHCFM_CIFAR10",
    "TORCHCFM_MNIST",
    "EDM_ADM_64",
]
