"""Images with their texts, and runs that distil a text-to-image model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlmctl.diffusion.noise import stream_key
from dlmctl.distill.diffusers_networks import VARIANCE_PRESERVING
from dlmctl.distill.guided_consistency import guided_loss
from dlmctl.distill.image_checkpoints import ModelConfig
from dlmctl.distill.image_training import TrainingRun
from dlmctl.distill.text_pipelines import TextPipeline, student_config, student_unet
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import OnError, Record, located
from dlmctl.settings.distill import GuidedDistillation
from dlmctl.settings.images import Training
from dlmctl.tasks.images import record_images
from dlmctl.tasks.readers import read_rows

COLUMNS = ("prompt", "text", "caption")
"""Names of a column of texts; the first that a row has counts."""


def read_texts(name: str) -> list[str]:
    """Texts of a file: the lines of .txt that are not empty, or a column of rows.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: it has no texts.
    """
    texts = [text_of(row) for row in read_prompts([name], "fail")]
    if not texts:
        raise DataError("it has no texts", name)
    return texts


def read_prompts(names: Sequence[str], on_error: OnError) -> Iterator[Record]:
    """Records of files of texts: the lines of .txt, as `prompt`, or rows; `-` is standard input.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: a row cannot be read.
    """
    for name in names or ["-"]:
        if Path(name).suffix == ".txt" and Path(name).is_file():
            lines = Path(name).read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield located({"prompt": line.strip()}, f"{name}:{number}")
        else:
            yield from read_rows(name, "train", None, on_error)


def read_captioned(name: str) -> tuple[Tensor, list[str]]:
    """Images of a file or data set, float32 [N, 3, H, W] in [-1, 1], and the text of each.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: a row has not one image and a text, or images are of several sizes.
    """
    import numpy

    images, texts = [], []
    for row in read_rows(name, "train", None, "fail"):
        pictures = record_images(row)
        if len(pictures) != 1:
            raise DataError(f"one image is expected, and there are {len(pictures)}", row.where)
        array = numpy.asarray(pictures[0], dtype=numpy.float32)
        images.append(torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1))
        texts.append(text_of(row))
        if images[-1].shape != images[0].shape:
            raise DataError("an image of another size than the first", row.where)
    if not images:
        raise DataError("it has no rows", name)
    return torch.stack(images), texts


def text_of(row: Record) -> str:
    """The text of a row; raises DataError if it has none."""
    name = next((column for column in COLUMNS if isinstance(row.get(column), str)), None)
    if name is None:
        raise DataError(
            f"no text: {', '.join(COLUMNS)} are the columns that can have it", row.where
        )
    return str(row[name])


class StudentNetwork(nn.Module):
    """What is trained and saved of a student: its U-Net."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet


def guided_run(
    directory: Path,
    teacher: TextPipeline,
    plan: GuidedDistillation,
    images: Tensor,
    texts: list[str],
    recipe: Training,
    about: Mapping[str, Any],
) -> TrainingRun:
    """Begin a student, or resume the one in the directory; raises as `TrainingRun`.

    Latents and states of the text encoder are computed once, and held together on the device.

    Raises:
        UsageError: the teacher is a student, or images do not fit it.
    """
    if teacher.is_student:
        raise UsageError(f"--teacher {teacher.name} is a student itself")
    torch.manual_seed(stream_key(recipe.seed, "weights"))
    unet, unet_config = student_unet(teacher, plan.strength_size)
    network = student_config(teacher, unet_config, plan.ddim_steps)
    shape = network.shape
    latents = teacher.autoencoder.encode_for(images, shape, teacher.name)
    states = teacher.encode(texts).cpu()
    length, size = math.prod(shape), tuple(states.shape[1:])

    def loss(
        student: nn.Module,
        target: nn.Module,
        batch: Tensor,
        _step: int,
        random: torch.Generator,
        own: slice,
    ) -> Tensor:
        parts = batch[:, :length].view(-1, *shape), batch[:, length:].view(-1, *size)
        pair = student.get_submodule("unet"), target.get_submodule("unet")
        return guided_loss(plan, teacher.process, *pair, *parts, random, own)

    rows = torch.cat([latents.flatten(1), states.flatten(1)], 1)
    config = ModelConfig("consistency", network, VARIANCE_PRESERVING, teacher.noise)
    source = {"teacher": teacher.name, "teacher_revision": teacher.revision}
    about = {"objective": "lcm", **asdict(plan), **source, **about}
    return TrainingRun(
        directory,
        config,
        StudentNetwork(unet),
        loss,
        rows,
        recipe,
        about,
        plan.target_ema,
        teacher.device,
    )
