"""Sampling with corrupted images: what a policy answers where it sees less, or nothing.

The images are those of the visual contrast for the same seed. Their hashes in the record name the
corruption too, so that nothing is trained on with images that it was not sampled with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dlmctl.diffusion.noise import stream_key
from dlmctl.models.corruption import NO_IMAGE, Unseen, corrupt
from dlmctl.models.policy import Policy
from dlmctl.models.vision import Picture
from dlmctl.records.errors import UsageError


def with_corrupted_images(policy: Policy, kind: Unseen, probability: float, seed: int) -> Policy:
    """The policy, seeing every image of a record corrupted, or none.

    Args:
        probability: of `patch`.

    Raises:
        UsageError: it takes no images.
    """
    vision = policy.vision
    if vision is None:
        raise UsageError(f"--corrupt is of images, and {policy.name} takes none")

    if kind == NO_IMAGE:
        return dataclasses.replace(policy, vision=dataclasses.replace(vision, left_out=True))

    def alter(record: Mapping[str, Any], number: int, picture: Picture) -> Picture:
        key = stream_key(seed, record.get("id", ""), -1, number)
        made = corrupt(picture, vision, kind, probability, key)
        return made._replace(digest=f"{picture.digest}/{kind}")

    return dataclasses.replace(policy, vision=dataclasses.replace(vision, alter=alter))
