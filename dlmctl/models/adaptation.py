"""A diffusion model from an autoregressive one: the same weights, read in both directions.

A mask token, `is_causal = False` and how to read the model are all that changes; training it to
denoise is then supervised fine-tuning (DiffuLLaMA, arXiv 2410.17891, section 3; Dream, arXiv
2508.15487; A2D of github.com/ZHZisZZ/dllm). Layers with a sliding window keep it, to both sides: as
far as the source saw to the left. Its positions were not trained for more, and Gemma's local layers
have rotary frequencies of their own.

Files of weights are copied as they are, except for one whose mask token needs a row.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dlmctl.models.architecture import FAULTS, Architecture, architecture
from dlmctl.models.loading import load_policy, model_directory
from dlmctl.models.saving import save_tokenizer
from dlmctl.models.sight import blind_block
from dlmctl.models.special_tokens import load_tokenizer, special_tokens
from dlmctl.models.weightless import weightless_model
from dlmctl.models.weights import read_weights, stored_dtype, weight_files
from dlmctl.records.errors import DataError, UsageError, reason_of
from dlmctl.records.files import publish_directory, read_json
from dlmctl.settings.adapted import Adapted
from dlmctl.settings.models import split_name

FAMILIES = {"bidirectional": "a2d", "block-causal": "bd3lm"}
"""Attention pattern to family."""

NEW_MASK = "<|mask|>"
MASK_TOKENS = (NEW_MASK, "<mask>", "[MASK]")
RESERVED = re.compile(
    r"<unused_?\d+>|\[unused_?\d+\]|<\|?(reserved_)?(special_)?(token|reserved|placeholder|dummy|"
    r"extra)_?\d+\|?>"
)
"""Tokens that tokenizers keep for the use of others, as in Gemma, Llama 3, Phi and Qwen."""

EMPTY = 0.1
"""A row shorter than this part of the average was never trained, as Llama 3's reserved tokens."""

PART = 4096
"""Rows that are summed up at a time."""


@dataclass(frozen=True)
class MaskToken:
    """The mask token of the new model."""

    text: str
    number: int
    """Its id."""
    known: bool
    """It was in the vocabulary."""


@dataclass(frozen=True)
class Adaptation:
    """What was made, for people."""

    family: str
    source_class: str
    parameters: int
    mask: MaskToken
    row: str
    """Where the embedding of the mask token comes from."""


def adapt(settings: Adapted, sampling: dict[str, int], target: Path) -> Adaptation:
    """Write the diffusion model to `target`, which appears whole or not at all.

    Args:
        sampling: its own gen_length, block_length and steps; the second is also that of attention
            in blocks.

    Raises:
        UsageError: there is no block_length for attention in blocks, or the source is no
            autoregressive language model.
        DataError: it cannot be loaded, or some layer of its class reads from left to right only.
        MissingInputError, TryAgainError: it is not there.
    """
    # 1. What the source is.
    name, in_blocks = settings.source or "", settings.pattern == "block-causal"
    block_length = sampling.get("block_length") if in_blocks else None
    if in_blocks and block_length is None:
        raise UsageError("--pattern block-causal needs --block-length")
    directory = model_directory(name)
    if (directory / "adapter_config.json").exists():
        raise UsageError(f"--from {name} is an adapter: merge it first with 'dlmctl merge'")
    file = directory / "config.json"
    raw = read_json(file)
    arch = architecture(raw, str(file), split_name(name)[1])
    _check_source(name, raw, arch)
    tokenizer = load_tokenizer(directory, arch)
    special_tokens(name, arch, tokenizer, directory)
    files = weight_files(directory)

    # 2. What changes.
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    mask = choose_mask(tokenizer, settings.mask_token)
    size = max(arch.config.vocab_size, mask.number + 1)
    outline = weightless_model(arch, file, torch.float32)
    rows = _MaskRow(mask, tokens, size)
    marker = {
        "family": FAMILIES[settings.pattern],
        "mask_token_id": mask.number,
        "shift": settings.shift,
        **({"block_length": block_length} if block_length is not None else {}),
        "sampling": sampling,
    }
    fields = {k: v for k, v in raw.items() if k not in ("auto_map", "dlmctl")}
    fields |= {"vocab_size": size, "is_causal": False, "dlmctl": marker}

    # 3. Write it, and see whether it reads in both directions.
    def fill(partial: Path) -> None:
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        if (generation := directory / "generation_config.json").exists():
            shutil.copyfile(generation, partial / generation.name)
        save_tokenizer(tokenizer, partial)
        _write_weights(files, partial, outline, rows)
        _check_sight(name, partial, stored_dtype(files))

    publish_directory(target, fill)
    tables = {id(table): table for table in _tables(outline).values()}
    count = sum(p.numel() for p in outline.parameters())
    count += rows.grown * sum(table[0].numel() for table in tables.values())
    return Adaptation(FAMILIES[settings.pattern], type(outline).__name__, count, mask, rows.origin)


def _check_source(name: str, raw: dict[str, Any], arch: Architecture) -> None:
    """Raise UsageError for what is not an autoregressive language model of one part."""
    config = arch.config
    text: PretrainedConfig = config.get_text_config()
    encoder = config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if arch.family.diffusion:
        reason = f"it denoises already (family {arch.family.name}): train it with 'dlmctl update'"
    elif encoder or getattr(text, "use_bidirectional_attention", False):
        reason = f"a model of type '{config.model_type}' is an encoder, not a decoder"
    elif text is not config:
        reason = f"a model of type '{config.model_type}' has more parts than a language model"
    elif raw.get("quantization_config"):
        reason = "its weights are quantized; take those that they were made of"
    else:
        return
    raise UsageError(f"--from {name}: {reason}")


def choose_mask(tokenizer: Any, wanted: str | None) -> MaskToken:
    """Make a token the tokenizer's mask token; without one to be had, a new one joins it.

    Args:
        wanted: its text; None: the mask token that the tokenizer has, or one that is called so, or
            the reserved one with the lowest id.
    """
    known = tokenizer.get_vocab()
    text = wanted if wanted is not None else tokenizer.mask_token
    if text is None:
        text = next((token for token in MASK_TOKENS if token in known), None)
    if text is None:
        reserved = [token for token in known if RESERVED.fullmatch(token)]
        text = min(reserved, key=known.__getitem__, default=NEW_MASK)
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
    if text in taken - {None}:
        raise UsageError(f"--mask-token {text} is a special token of another use")
    tokenizer.add_special_tokens({"mask_token": text})
    return MaskToken(text, tokenizer.convert_tokens_to_ids(text), text in known)


class _MaskRow:
    """Gives the tables of a model, [V, ...], the row of the mask token.

    A token that the source was trained with keeps its row. Another one gets the mean of the others,
    as transformers does for new tokens and DiffuLLaMA for its mask.
    """

    def __init__(self, mask: MaskToken, tokens: int, size: int) -> None:
        self._mask, self._tokens, self._size = mask, tokens, size
        self.grown = 0
        """Rows that were added."""
        self.origin = "unchanged"

    def needed(self, table: Tensor) -> bool:
        """Whether the table changes; the table is that of the embeddings or of the head."""
        if not self._mask.known or len(table) <= self._mask.number:
            return True
        lengths = torch.linalg.vector_norm(
            table.reshape(len(table), -1), dim=1, dtype=torch.float32
        )
        return bool(lengths[self._mask.number] < EMPTY * lengths.mean())

    def __call__(self, table: Tensor) -> Tensor:
        """A copy of the table with the row; [V, ...] in, [max(V, mask's id + 1), ...] out."""
        others = table[: self._tokens]
        # In parts, as the sum in float64 copies what it sums up.
        sums = [part.sum(dim=0, dtype=torch.float64) for part in others.split(PART)]
        total, count = torch.stack(sums).sum(dim=0), len(others)
        if self._mask.number < count:
            total, count = total - others[self._mask.number].double(), count - 1
        mean = (total / count).to(table.dtype)
        self.grown = max(0, self._size - len(table))
        self.origin = "the mean of the others"
        grown = torch.cat([table, mean.expand(self.grown, *mean.shape)])
        grown[self._mask.number] = mean
        return grown


def _tables(model: Any) -> dict[str, Tensor]:
    """Parameters of the embeddings and of the head, [V, ...], by name; tied ones by both."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = {id(p) for part in parts if part is not None for p in part.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) in wanted}


def _write_weights(files: list[Path], target: Path, model: Any, row: _MaskRow) -> None:
    """Copy the files of weights; those with a table that changes are written anew.

    Args:
        model: on the meta device; checkpoints may leave out the prefix of its names.
    """
    prefix = f"{model.base_model_prefix}."
    tables = {name.removeprefix(prefix) for name in _tables(model)}
    added = 0
    for file in files:
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata()
            names = [name for name in shard.keys() if name.removeprefix(prefix) in tables]  # noqa: SIM118
            changed = {name: t for name in names if row.needed(t := shard.get_tensor(name))}
        if not changed:
            shutil.copyfile(file, target / file.name)
            continue
        tensors = read_weights([file], str)
        for name, table in changed.items():
            tensors[name] = row(table)
            added += tensors[name].nbytes - table.nbytes
        save_file(tensors, target / file.name, metadata=metadata)
    index = files[0].parent / "model.safetensors.index.json"
    if files[0].name != "model.safetensors":
        stated = read_json(index)
        size = stated.setdefault("metadata", {}).get("total_size", 0)
        stated["metadata"]["total_size"] = size + added
        (target / index.name).write_text(json.dumps(stated, indent=2) + "\n")


def _check_sight(name: str, directory: Path, dtype: str) -> None:
    """Raise DataError if some block of the new model reads from left to right only."""
    try:
        policy = load_policy(str(directory), "cpu", dtype)
    except DataError as error:
        raise DataError(f"--from {name}: {str(error).removeprefix(f'{directory}: ')}") from None
    try:
        reason = blind_block(policy)
    except FAULTS as error:
        reason = f"a pass of it fails ({reason_of(error)})"
    if reason:
        raise DataError(f"--from {name}: {reason}")
