"""The card of a checkpoint of `distill teacher` or `distill cd`: a model of images or vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.distill.diffusers_models import is_discrete
from dlmctl.distill.diffusers_networks import DiffusersConfig
from dlmctl.distill.image_checkpoints import ModelConfig
from dlmctl.train.card import DIRECTORY, Card

KINDS = {"edm": "diffusion model", "consistency": "consistency model"}


def image_card(
    config: ModelConfig, training: Mapping[str, Any], metrics: Mapping[str, float]
) -> Card:
    """The card of a checkpoint.

    Args:
        training: `training` of the checkpoint's config.json, which includes the step.
        metrics: of the last step.
    """
    kind = KINDS[config.kind]
    shape = " x ".join(map(str, config.network.shape))
    data = training.get("images")
    of = f" of `{data}`" if data else ""
    shown = {name: v for name, v in training.items() if name not in ("checkpoints", "first")}
    use = f"dlmctl distill sample {DIRECTORY} -n 1000 -o samples.safetensors"
    code = (
        "from dlmctl.distill.image_checkpoints import load_model\n\n"
        f'model = load_model("{DIRECTORY}")'
    )
    pipelined = isinstance(config.network, DiffusersConfig) and is_discrete(config.network)
    texts = isinstance(config.network, DiffusersConfig) and config.network.text is not None
    if pipelined:
        call = '"a prompt", num_inference_steps=4' if texts else "num_inference_steps=1"
        code = (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{DIRECTORY}")\n'
            f"image = pipeline({call}).images[0]"
        )
    if texts:
        use += " --prompts prompts.txt --steps 4"
    pixels = "unconditional-image-generation" if len(config.network.shape) == 3 else None
    return Card(
        title=f"A {kind}, step {training['step']}",
        summary=f"A {kind}{of}, arrays of {shape}, trained by dlmctl.",
        library="diffusers" if pipelined else "dlmctl",
        tags=[kind.replace(" ", "-")],
        pipeline="text-to-image" if texts else pixels,
        settings={"steps so far": training["step"], **shown},
        metrics=metrics,
        usage=[("sh", use), ("python", code)],
    )
