"""The 2,048 features of which FID and KID are taken.

The network is Inception v3 of the TensorFlow graph of 2015-12-05, which Heusel et al. 2017 (arXiv
1706.08500) use; torch-fidelity has it. Images are rounded to bytes before they are resized.

    tensorflow   bilinear without antialiasing, as TensorFlow 1 resizes, and as pytorch-fid (about),
                 torch-fidelity (exactly) and the published values of most papers have it
    clean        bicubic with antialiasing in floats, clamped to [0, 255], as clean-fid has it
                 (Parmar et al. 2022, arXiv 2104.11222)

Values of the two, and of other weights, cannot be compared.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.memorization.images.image_bytes import rgb_bytes
from dlmctl.memorization.images.weights_file import read_state, sha256
from dlmctl.models.float32_products import whole_products
from dlmctl.records.errors import DataError, UnavailableError, missing_package, reason_of
from dlmctl.settings.memorization import InceptionResize

EDGE = 299
WIDTH = 2048
PUBLISHED = "6726825d"
"""First digits of the hash of the published weights, which are in the name of their file."""


class InceptionEncoder:
    """The network with weights that the user has."""

    def __init__(self, file: Path, resize: InceptionResize, device: torch.device) -> None:
        """Load the network.

        Raises:
            UnavailableError: torch-fidelity is not installed, or does not work with this torch.
            MissingInputError, DataError: as `read_state`; or these are weights of another network.
        """
        state = read_state(file)
        self.trunk, self.resize_like_tensorflow = _network(state, file)
        self.trunk.to(device).float().eval()
        self.resize, self.device = resize, device
        self.about = {
            "inception": str(file),
            "inception_sha256": sha256(file),
            "inception_resize": resize,
        }
        if not self.about["inception_sha256"].startswith(PUBLISHED):
            print(
                f"dlmctl: {file} is not the published file, whose SHA-256 begins with {PUBLISHED}: "
                "if it is not made of it, compare fid and kid only with values by the same weights",
                file=sys.stderr,
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Features, float32 [N, 2048] on the CPU, of images [N, C, H, W] in [-1, 1].

        Raises:
            UsageError: the images are vectors, or have other than 1 or 3 channels.
        """
        features = []
        for part in rgb_bytes(images, "--inception").split(batch_size):
            pixels = self._resized(part.to(self.device).float())
            with whole_products():
                features.append(self.trunk((pixels - 128) / 128).flatten(1).cpu())
        return torch.cat(features)

    def _resized(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, 299, 299] of [B, 3, H, W], both in [0, 255]."""
        size = (EDGE, EDGE)
        if self.resize == "tensorflow":
            resized: Tensor = self.resize_like_tensorflow(pixels, size=size, align_corners=False)
            return resized
        # In float64, as Pillow weighs pixels; float32 would be off by 1e-3 of 255.
        return (
            functional.interpolate(
                pixels.double(), size, mode="bicubic", antialias=True, align_corners=False
            )
            .clamp(0, 255)
            .float()
        )


def notes_on_fid(least: int) -> list[str]:
    """What to know of FID if the smallest set has this many images."""
    if least > WIDTH:
        return []
    return [
        f"the smallest set has {least} images: covariances of {WIDTH} features are singular then, "
        "and fid is far too large. Published values are of 50,000 images; kid has no such bias"
    ]


def _network(state: dict[str, Tensor], file: Path) -> tuple[nn.Sequential, Any]:
    """torch-fidelity's network up to its pooled features, and its function that resizes."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.interpolate_compat_tensorflow import (
            interpolate_bilinear_2d_like_tensorflow1x,
        )
    except ModuleNotFoundError as error:
        package = "torchvision" if error.name == "torchvision" else "torch-fidelity"
        raise missing_package(package, "fid", "--inception") from None
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch
        reason = reason_of(error)
        raise UnavailableError(
            f"--inception needs torch-fidelity, and its torchvision does not work with torch "
            f"{torch.__version__} ({reason}): install the torchvision of this torch"
        ) from None

    # The library reads weights by an unrestricted pickle, and so only what is written here.
    written = io.BytesIO()
    torch.save(state, written)
    written.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=written
        )
    except RuntimeError as error:  # a title, then what is wrong with which weights
        reason = " ".join(str(error).split("\n")[:2])
        raise DataError(
            f"no weights of FID's Inception network ({reason:.150} …)", str(file)
        ) from None
    parts = dict(network.named_children())
    del parts["fc"]  # everything before it is a sequence that ends with the pooling
    return nn.Sequential(*parts.values()), interpolate_bilinear_2d_like_tensorflow1x
