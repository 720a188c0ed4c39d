"""Images as a file of bytes would have them, which published measures read."""

from __future__ import annotations

from torch import Tensor

from dlmctl.records.errors import UsageError


def rgb_bytes(images: Tensor, option: str) -> Tensor:
    """uint8 [N, 3, H, W] of images [N, C, H, W] in [-1, 1]; a gray one has three equal channels.

    Args:
        option: the command line's name of what takes the images, for the error message.

    Raises:
        UsageError: these are vectors, or images of other than 1 or 3 channels.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"{option} takes images of 1 or 3 channels, not {list(images.shape[1:])}")
    levels = ((images + 1) * 127.5).round().clamp(0, 255).byte()
    return levels.expand(-1, 3, -1, -1)
