"""Text-to-image pipelines of diffusers in the manner of Stable Diffusion 1 and 2: teachers of
latents, and the students that `guided_consistency` makes of them.

    PIPELINE/model_index.json, unet/, scheduler/, vae/, text_encoder/, tokenizer/

A student is a `LatentConsistencyModelPipeline`, with dlmctl.json. Safety checkers are neither used
nor copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlmctl.distill.diffusers_directories import (
    CONFIG,
    DISCRETE,
    INDEX,
    LCM,
    RECORD,
    TEXT_PARTS,
    UNREADABLE,
    diffusers_class,
    first_line,
    load_part,
    make_scheduler,
    part_files,
    scheduler_config,
)
from dlmctl.distill.diffusers_models import Autoencoder, load_autoencoder, student_of
from dlmctl.distill.diffusers_networks import DiffusersConfig, log_levels
from dlmctl.distill.guided_consistency import GuidedTeacher
from dlmctl.models.weights import read_weights, weight_files, weights_hash
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.files import read_json
from dlmctl.settings.images import NoiseRange

UNET = "UNet2DConditionModel"
CLASSES = {
    "unet": ("diffusers", UNET),
    "vae": ("diffusers", "AutoencoderKL"),
    **TEXT_PARTS,
}
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of such pipelines that do not change a sample of a text."""


@dataclass(frozen=True)
class TextPipeline:
    """A text-to-image model, ready to evaluate."""

    name: str
    config: DiffusersConfig
    process: GuidedTeacher
    """Its U-Net is that of the pipeline, be it a teacher's or a student's."""
    autoencoder: Autoencoder
    encoder: Any
    tokenizer: Any
    device: torch.device
    training: Mapping[str, Any] | None
    revision: str

    @property
    def is_student(self) -> bool:
        """Whether its network takes the guidance scale."""
        return self.config.scheduler_class == LCM

    @property
    def scaling(self) -> float:
        """`timestep_scaling` of a student."""
        return float(self.config.scheduler.get("timestep_scaling", 10.0))

    @property
    def noise(self) -> NoiseRange:
        """The levels of its timesteps."""
        levels = self.process.table.exp()
        return NoiseRange(float(levels[0]), float(levels[-1]))

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """States of the text encoder, float32 [N, L, E]; longer texts are cut to L tokens."""
        return encoded(self.encoder, self.tokenizer, texts, self.device, batch_size)


def is_text_pipeline(directory: Path) -> bool:
    """Whether a directory is a pipeline with a text encoder."""
    index = directory / INDEX
    return index.is_file() and read_json(index).get("text_encoder") not in (None, [None, None])


def load_text_pipeline(directory: Path, device: torch.device) -> TextPipeline:
    """The model of a directory.

    Raises:
        MissingInputError: a part is missing.
        DataError: a part is damaged, or of a model that is not handled.
        UnavailableError: diffusers is not installed.
    """
    _check_parts(directory)
    unet = _unet_config(directory / "unet" / CONFIG)
    path = directory / "scheduler" / "scheduler_config.json"
    chosen = scheduler_config(path)
    scheduler = make_scheduler(chosen, str(path))
    if (chosen["_class_name"] == LCM) != (unet.get("time_cond_proj_dim") is not None):
        raise DataError(
            f"{chosen['_class_name']} with time_cond_proj_dim {unet.get('time_cond_proj_dim')}: a "
            f"student has {LCM} and an embedding of the guidance scale, a teacher neither",
            str(path),
        )
    if scheduler.config.get("clip_sample"):
        raise DataError("clip_sample is for pixels, and this is a model of latents", str(path))
    if chosen["_class_name"] not in (*DISCRETE, LCM):
        raise DataError(f"{chosen['_class_name']} is not handled for a model of texts", str(path))
    side = unet["sample_size"]
    shape = (unet["in_channels"], *(side if isinstance(side, list) else (side, side)))
    config = DiffusersConfig(shape, unet, chosen, str(directory / "vae"), str(directory))
    autoencoder = load_autoencoder(config, device)
    assert autoencoder is not None
    encoder, tokenizer = _text_encoder(directory, device)
    network = load_part(directory / "unet", UNET).to(device)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    empty = encoded(encoder, tokenizer, [""], device)[0]
    table = log_levels(scheduler.alphas_cumprod)
    process = GuidedTeacher(network, table, scheduler.config.prediction_type, empty).to(device)
    record = directory / RECORD
    return TextPipeline(
        str(directory),
        config,
        process,
        autoencoder,
        encoder,
        tokenizer,
        device,
        read_json(record).get("training") if record.is_file() else None,
        weights_hash(part_files(directory / "unet")),
    )


def student_unet(teacher: TextPipeline, size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A student's U-Net with the teacher's weights, and its configuration.

    Args:
        size: of the embedding of the guidance scale, whose weights are 0.
    """
    about = {**teacher.config.unet, "time_cond_proj_dim": size}
    unet: nn.Module = diffusers_class(UNET).from_config(about)
    missing, unexpected = unet.load_state_dict(teacher.process.unet.state_dict(), strict=False)
    assert (missing, unexpected) == (["time_embedding.cond_proj.weight"], [])
    nn.init.zeros_(unet.get_parameter(missing[0]))
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return unet, about


def student_config(
    teacher: TextPipeline, unet: Mapping[str, Any], ddim_steps: int
) -> DiffusersConfig:
    """The configuration of a teacher's student.

    Raises:
        UsageError: the steps do not divide the teacher's timesteps.
    """
    total = len(teacher.process.table)
    if total % ddim_steps:
        raise UsageError(f"--ddim-steps {ddim_steps} does not divide the {total} timesteps")
    made = student_of(teacher.config, teacher.noise, False)
    scheduler = {**made.scheduler, "original_inference_steps": ddim_steps}
    return replace(made, unet=unet, scheduler=scheduler)


def encoded(
    encoder: Any,
    tokenizer: Any,
    texts: Sequence[str],
    device: torch.device,
    batch_size: int = 64,
) -> Tensor:
    """See `TextPipeline.encode`."""
    states = []
    for first in range(0, len(texts), batch_size):
        tokens = tokenizer(
            list(texts[first : first + batch_size]),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        with torch.no_grad():
            states.append(encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float())
    return torch.cat(states)


def _check_parts(directory: Path) -> None:
    index = read_json(directory / INDEX)
    parts = {k: v for k, v in index.items() if isinstance(v, list) and v != [None, None]}
    for name, expected in CLASSES.items():
        if name not in parts:
            raise MissingInputError(f"{directory} has no part {name}")
        if tuple(parts[name]) != expected:
            shown = ".".join(map(str, parts[name]))[:80]
            raise DataError(
                f"the {name} is {shown}; {'.'.join(expected)} is handled", str(directory / INDEX)
            )
    other = [n for n in parts if n not in (*CLASSES, "scheduler", *UNUSED)]
    if other:
        raise DataError(
            f"a text-to-image pipeline with the part {other[0]}; those of the kind of Stable "
            "Diffusion 1 and 2 are handled",
            str(directory / INDEX),
        )


def _unet_config(path: Path) -> dict[str, Any]:
    config = {k: v for k, v in read_json(path).items() if k != "_name_or_path"}
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim"):
        if config.get(name) is not None:
            raise DataError(f"the U-Net takes more than a text ({name})", str(path))
    if "quantization_config" in config:
        raise DataError("quantized weights are not handled", str(path))
    embedding = config.get("time_embedding_type", "positional")
    channels, side = config.get("in_channels"), config.get("sample_size")
    if channels != config.get("out_channels") or embedding != "positional":
        raise DataError(
            f"a U-Net with {channels} channels in, {config.get('out_channels')} out and a "
            f"{embedding!s:.40} embedding of time is not handled",
            str(path),
        )
    sides = side if isinstance(side, list) else [side, side]
    if len(sides) != 2 or not all(type(n) is int and n > 0 for n in (*sides, channels)):
        raise DataError("it says no sample_size, the height and width of a sample", str(path))
    return config


def _text_encoder(directory: Path, device: torch.device) -> tuple[Any, Any]:
    """The text encoder and its tokenizer; raises as `load_text_pipeline`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    place = directory / "text_encoder"
    try:
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(str(place)))
        # Versions of transformers differ in whether names begin with this.
        names = {name.removeprefix("text_model."): name for name in encoder.state_dict()}
        tensors = read_weights(weight_files(place), lambda name: name.removeprefix("text_model."))
        tensors.pop("embeddings.position_ids", None)  # of older files
        encoder.load_state_dict({names.get(k, k): v for k, v in tensors.items()}, strict=True)
        tokenizer = CLIPTokenizer.from_pretrained(str(directory / "tokenizer"))
        longest = encoder.config.max_position_embeddings
        if not 0 < tokenizer.model_max_length <= longest:
            raise ValueError(
                f"the tokenizer makes up to {tokenizer.model_max_length} tokens, and the encoder "
                f"takes {longest}"
            )
    except UNREADABLE as error:
        reason = f"the text encoder cannot be loaded: {first_line(error)}"
        raise DataError(reason, str(place)) from None
    return encoder.to(device).eval().requires_grad_(False), tokenizer
