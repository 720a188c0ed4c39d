"""Features of images from a model in a directory: config.json and safetensors, no remote code.

Images are resized to the input size of the model, gray ones get three channels, and the mean and
standard deviation of preprocessor_config.json are applied if it has them.

With facebook/dinov2-large the Fréchet distance of the features is FD-DINOv2 (Stein et al. 2023,
arXiv 2306.04675). As in their dgm-eval, images are squeezed to 224 x 224 pixels without cropping,
bicubic and antialiased in floats (its `--clean_resize`; without it Pillow rounds to bytes), and
normalized as ImageNet's; the features are the class token after the last normalization. Position
embeddings are resampled as DINOv2's own code does, which is not quite as transformers does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.models.float32_products import whole_products
from dlmctl.models.weights import weight_files, weights_hash
from dlmctl.records.errors import DataError, MissingInputError, UsageError, reason_of
from dlmctl.records.files import read_json

_SIZE = 224
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_DINOV2: dict[str, Any] = {"crop_size": _SIZE, **_IMAGENET}
"""What the preprocessor of every DINOv2 says. Its network's own size is that of the last stage of
training, 518."""


_OFFSET = 0.1
"""What DINOv2's own code adds to the size of a grid of positions before it scales to it."""


class ImageEncoder:
    """A model that maps images to features."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Load the model.

        Raises:
            MissingInputError: there is no model in the directory.
            DataError: the model cannot be loaded, or its weights are pickled.
        """
        from transformers import AutoModel

        if not (directory / "config.json").exists():
            raise MissingInputError(f"{directory} has no config.json: it is not a model")
        files = weight_files(directory)
        try:
            model, report = AutoModel.from_pretrained(
                directory,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds
            reason = reason_of(error)
            raise DataError(f"{directory} cannot be loaded as a model ({reason})") from None
        missing = sorted(report["missing_keys"])
        self.pools = not any("pooler" in name for name in missing)
        """Whether the checkpoint has a pooler, which that of a classifier lacks."""
        if others := [name for name in missing if "pooler" not in name]:
            raise DataError(
                f"{directory}: {len(others)} weights are missing, first {others[0]}: features "
                "would be random"
            )
        self.model = model.to(device).float().eval()
        self.name, self.device = str(directory), device
        preprocessor = directory / "preprocessor_config.json"
        usual = _DINOV2 if str(model.config.model_type).startswith("dinov2") else {}
        about = read_json(preprocessor) if preprocessor.exists() else usual
        self.size = _size(model.config, about)
        if model.config.model_type == "dinov2":
            _resample_positions(model.embeddings, self.size)
        self.about = {
            "extractor": str(directory),
            "extractor_revision": weights_hash(files),
            "extractor_size": "x".join(map(str, self.size)),
        }
        self.mean, self.std = (
            torch.tensor(about.get(name) or [0.5] * 3, device=device).view(1, 3, 1, 1)
            for name in ("image_mean", "image_std")
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features, float32 [N, F] on the CPU, of images [N, C, H, W] in [-1, 1].

        Raises:
            UsageError: the images are vectors, or have other than 1 or 3 channels.
            DataError: the model does not take images, or does not return features.
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UsageError(f"--extractor takes images of 1 or 3 channels, not {images.shape[1:]}")
        features = []
        for part in images.split(batch_size):
            pixels = part.to(self.device).expand(-1, 3, -1, -1)
            pixels = functional.interpolate(
                pixels, self.size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(-1, 1)
            pixels = ((pixels + 1) / 2 - self.mean) / self.std
            with whole_products():
                features.append(self._features(pixels).float().cpu())
        return torch.cat(features)

    def _features(self, pixels: Tensor) -> Tensor:
        try:
            if hasattr(self.model, "get_image_features"):
                output = self.model.get_image_features(pixel_values=pixels)
            else:
                output = self.model(pixel_values=pixels)
        except (TypeError, ValueError) as error:
            reason = reason_of(error)
            raise DataError(f"{self.name} does not take images ({reason})") from None
        if isinstance(output, Tensor):
            return output.flatten(1)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.pools:
            return pooled.flatten(1)
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise DataError(f"{self.name} gives neither pooler_output nor last_hidden_state")
        return states.mean(1) if states.dim() == 3 else states.flatten(2).mean(2)


class ClipScorer:
    """Cosine of image and text by a CLIP model (Hessel et al. 2021, arXiv 2104.08718).

    Their score is 2.5 max(cosine, 0). Images are squeezed to the model's size, without cropping.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Load the model and its tokenizer.

        Raises:
            MissingInputError, DataError: as `ImageEncoder`; or it is no CLIP, or has no tokenizer.
        """
        from transformers import CLIPTokenizer

        self.images = ImageEncoder(directory, device)
        config = self.images.model.config
        if config.model_type != "clip":
            raise DataError(f"{directory} is a {config.model_type}, and --clip takes a CLIPModel")
        # Without its files the class makes an empty tokenizer.
        if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise MissingInputError(f"{directory} has no tokenizer.json: --clip needs a tokenizer")
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = reason_of(error)
            raise DataError(f"the tokenizer cannot be loaded ({reason})", str(directory)) from None
        self.longest = min(
            self.tokenizer.model_max_length, config.text_config.max_position_embeddings
        )
        about = self.images.about
        self.about = {"clip_model": str(directory), "clip_revision": about["extractor_revision"]}

    @torch.no_grad()
    def __call__(self, images: Tensor, text: str) -> Tensor:
        """float64 [N] of images [N, C, H, W] in [-1, 1] and a text, cut to what the model takes."""
        tokens = self.tokenizer(
            [text], truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.images.device)
        with whole_products():
            output = self.images.model.get_text_features(**tokens)
        states: Any = output if isinstance(output, Tensor) else output.pooler_output
        of_text, of_images = states.double().cpu(), self.images(images).double()
        return functional.cosine_similarity(of_images, of_text)


def _size(config: Any, about: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the model's input.

    The preprocessor's crop comes first: a model that interpolates its positions may state a larger
    size than it is fed, as DINOv2 does.
    """
    inner = getattr(config, "vision_config", None)
    crop = about.get("crop_size") if about.get("do_center_crop", True) else None
    size: Any = crop or getattr(config, "image_size", None) or getattr(inner, "image_size", None)
    size = size or about.get("size") or _SIZE
    if isinstance(size, dict):
        edge = size.get("shortest_edge", _SIZE)
        size = (size.get("height", edge), size.get("width", edge))
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _resample_positions(embeddings: Any, size: tuple[int, int]) -> None:
    """Give a DINOv2 the position embeddings that its own code has for square images of a size.

    With as many positions as patches transformers leaves them as they are.
    """
    old = embeddings.position_embeddings.data  # [1, 1 + side^2, D], that of the class first
    side = round((old.shape[1] - 1) ** 0.5)
    edge = size[0] // embeddings.patch_embeddings.patch_size[0]
    if size[0] != size[1] or edge == side:
        return
    grid = old[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    scale = (edge + _OFFSET) / side
    new = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    positions = torch.cat([old[:, :1], new.flatten(2).transpose(1, 2)], dim=1)
    embeddings.position_embeddings = torch.nn.Parameter(positions, requires_grad=False)
