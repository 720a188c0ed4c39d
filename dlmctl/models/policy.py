"""A policy: a model that denoises (or predicts the next token), its tokenizer and its conventions.

The rest of the package knows models only through this.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dlmctl.models.architecture import family_named
from dlmctl.models.attention import (
    Blocks,
    Narrowing,
    NoisedRows,
    additive,
    layer_masks,
    noised_rows,
    windowed_layers,
)
from dlmctl.models.compiled import compiled_layers
from dlmctl.models.families import Head, ModelFamily
from dlmctl.models.prompting import context_ids, prompt_ids, text_ids
from dlmctl.models.vision import Picture, Vision
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, field
from dlmctl.settings.compute import Quantization
from dlmctl.settings.families import Family
from dlmctl.settings.models import Prompting
from dlmctl.tasks.images import image_sources


@dataclass(frozen=True)
class Policy:
    """A loaded model."""

    model: nn.Module
    tokenizer: Any
    family: Family
    mask_id: int | None
    """Token for "not decided yet"; None for an autoregressive model."""
    eos_id: int | None
    """The end-of-sequence token that completions are padded with."""
    pad_id: int
    shift: int
    """The logits of position i are at position i - shift: 0 for LLaDA and masked LMs, 1 for Dream
    and autoregressive models."""
    vocab_size: int
    name: str
    """The name that it was loaded by: a hub name or a path."""
    revision: str
    """Hash of the weights; of quantized ones see models/quantization."""
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The model's own options of the sampler, if it has any: see `settings.sampler.OWN`."""
    blocks: Blocks | None = None
    """Its blocks, if it is block-causal."""
    narrowing: Narrowing | None = None
    """What of its attention is open, while training still opens it."""
    vision: Vision | None = None
    """How it takes images; None if it takes none."""
    prompting: Prompting = dataclasses.field(default_factory=Prompting)
    other_ends: frozenset[int] = frozenset()
    """Further tokens that end a completion, from generation_config.json."""
    turn_ends: frozenset[int] = frozenset()
    """Tokens that end a turn but not the completion, such as LLaDA's <|eot_id|>."""
    latent_masks: tuple[int, ...] = ()
    """All its mask tokens, the first of which is `mask_id`, if there are several: see
    models/latent_masks."""
    quantized: Quantization | None = None
    """Format of the linear layers of its blocks; None: they are as loaded."""

    @property
    def model_family(self) -> ModelFamily:
        """What its family declares."""
        return family_named(self.family)

    @property
    def diffusion(self) -> bool:
        """Whether it denoises; otherwise it is autoregressive."""
        return self.model_family.diffusion

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end a completion."""
        return self.other_ends if self.eos_id is None else self.other_ends | {self.eos_id}

    def check_one_mask(self) -> None:
        """Raise UsageError if it has several mask tokens, and so no score by one of them."""
        if self.latent_masks:
            raise UsageError(
                f"{self.name} has {len(self.latent_masks)} mask tokens, a latent variable: it can "
                "be sampled, and trained by 'dlmctl distill masked', and nothing else here reads it"
            )

    def length(self, tokens: Sequence[int]) -> int:
        """Number of tokens up to and including the first that ends a completion."""
        ends = self.ends
        return next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.core.config.get_text_config().hidden_size)

    @property
    def core(self) -> nn.Module:
        """The Hugging Face model itself, with its adapter's layers in place."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def hidden(
        self,
        ids: Tensor,
        attention: Tensor | None,
        positions: Tensor | None = None,
        cache: Any = None,
        compiled: bool = False,
        pictures: Sequence[Sequence[Picture]] = (),
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states.

        Args:
            ids: int64 [B, T], padding on the right.
            attention: bool [B, T], false for padding; None without padding. With a cache [B, S]
                for the S tokens whose keys it returns.
            positions: int64 [B, T], or [3, B, T] in three dimensions: positions of the tokens;
                None: counted from 0, or as the pictures require.
            cache: a transformers Cache with the keys and values of other tokens.
            compiled: run its layers through torch.compile, which happens at the first call.
            pictures: the images of each row, for a model that takes images.
            allowed: bool [B, T, T], with a cache [B, T, S]: which keys each token attends to. None:
                all, or as the model's class has it; for a block-causal model, the clean text.

        Returns:
            [B, T, H] in the dtype of the model.
        """
        body = self.body
        extra: dict[str, Any] = {"use_cache": False} if self.core.can_generate() else {}
        mask = None if attention is None else attention.long()
        if cache is not None:
            extra |= {cache_argument(body): cache}
        sees_all = self.diffusion and self.blocks is None and self.reuses_keys
        if attention is not None and (cache is not None or sees_all):
            # 4D, or the model derives it from the cache, and asks the device whether it is needed.
            mask = attention[:, None, None].expand(-1, 1, ids.shape[1], -1)
        if allowed is None and self.blocks is not None:
            allowed = self._clean_text(ids, attention)
        if allowed is not None:
            mask = allowed[:, None]
            if cache is None:
                columns = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
                places = columns if positions is None else positions
                mask = layer_masks(self.core.config, allowed, places)
        if self.core.config._attn_implementation == "eager":
            mask = additive(mask, self.core.dtype)
        if self.vision is not None and any(pictures):
            extra |= self.vision.inputs(self.core, pictures, ids.device)
            if positions is None:
                positions = self.vision.positions(self.core, ids, attention, pictures)
        if positions is not None:
            extra |= {"position_ids": positions}
        fast = compiled_layers(body, cache is not None) if compiled else contextlib.nullcontext()
        with fast:
            return body(input_ids=ids, attention_mask=mask, **extra).last_hidden_state

    @property
    def body(self) -> Any:
        """The decoder below the head, whose lists of modules are the layers."""
        return getattr(self.core, self.core.base_model_prefix)

    @property
    def reuses_keys(self) -> bool:
        """Whether it is a decoder that can reuse keys and values of an earlier pass: one whose
        layers all attend as far as its pattern does."""
        config = self.core.config
        if not self.model_family.reuses_keys or windowed_layers(config):
            return False
        return all(x == "full_attention" for x in getattr(config, "layer_types", None) or [])

    def _clean_text(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        """bool [B, T, T]: how the tokens of a text without noise, or without a past, attend."""
        assert self.blocks is not None
        columns = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        clean, starts = torch.zeros_like(columns, dtype=torch.bool), torch.zeros_like(ids[:, 0])
        allowed = self.blocks.attends(columns, columns, clean, clean, starts)
        return allowed if attention is None else allowed & attention[:, None]

    def noised_rows(
        self, clean: Tensor, noised: Tensor, wanted: Tensor, starts: Tensor, lengths: Tensor
    ) -> NoisedRows:
        """Rows of a pass over noised texts; arguments as in `attention.noised_rows`."""
        return noised_rows(self.blocks, self.shift, clean, noised, wanted, starts, lengths)

    def hidden_of(self, rows: NoisedRows, pictures: Sequence[Sequence[Picture]] = ()) -> Tensor:
        """Last hidden states of noised rows: [R, Q, H]."""
        allowed = rows.allowed
        if self.narrowing is not None:
            columns = torch.arange(rows.ids.shape[1], device=rows.ids.device).expand_as(rows.ids)
            narrowed = self.narrowing(columns if rows.positions is None else rows.positions)
            there = rows.attention if rows.attention is None else rows.attention[:, None]
            for other in (allowed, there):
                narrowed = narrowed if other is None else narrowed & other
            allowed = narrowed
        return self.hidden(
            rows.ids, rows.attention, rows.positions, pictures=pictures, allowed=allowed
        )

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] for hidden states [N, H]."""
        return self.head.logits(states)

    @property
    def head(self) -> Head:
        """What comes between the last hidden states and the logits."""
        return self.model_family.head(self.core)

    def source(self, positions: Tensor) -> Tensor:
        """The positions that have the logits of these positions."""
        return (positions - self.shift).clamp(min=0)

    def predict(
        self, ids: Tensor, attention: Tensor | None, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """Logits [N, V] of only the tokens at (rows, positions), int64 [N] each."""
        states = self.hidden(ids, attention)
        return self.logits(states[rows, self.source(positions)])

    def encode(self, record: Mapping[str, Any]) -> list[int]:
        """The ids of a record's prompt: `tokens.prompt` as it is, else `messages` or `prompt`.

        The text of a prompt is written as `prompting` says.

        Raises:
            DataError: there is no prompt, the tokenizer cannot express it, or the ids are those of
                another tokenizer.
        """
        return self._prompt(record, self._checked_tokens(record))

    def encode_completion(self, record: Record) -> list[int]:
        """The ids of a record's completion: `tokens.completion` as it is, else those of the text.

        Raises:
            DataError: there is none, the tokenizer cannot express it, or the ids are those of
                another tokenizer.
        """
        return self._completion(record, self._checked_tokens(record))

    def encode_both(self, record: Record) -> tuple[list[int], list[int]]:
        """`encode` and `encode_completion`, the tokens checked once."""
        tokens = self._checked_tokens(record)
        return self._prompt(record, tokens), self._completion(record, tokens)

    def _prompt(self, record: Mapping[str, Any], tokens: Mapping[str, Any]) -> list[int]:
        ids: list[int] | None = tokens.get("prompt")
        if ids:
            left_out = self.vision is not None and self.vision.left_out
            return self.vision.without_images(ids) if self.vision and left_out else list(ids)
        pictures = self.pictures(record)
        ids = prompt_ids(
            record, self.tokenizer, self.name, self.prompting, len(pictures), self.vision
        )
        return self.vision.expand(ids, pictures) if self.vision else ids

    def _completion(self, record: Record, tokens: Mapping[str, Any]) -> list[int]:
        ids: list[int] | None = tokens.get("completion")
        if ids is not None:
            return ids
        return self.encode_text(field(record, "completion", str, "'dlmctl rollout' writes it"))

    def _checked_tokens(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The field `tokens` of a record, whose ids must be those of this tokenizer.

        The record does not say which tokenizer its ids are of. If they do not decode to the text
        of the record, they are another's. It is enough that they begin with the text, since a model
        with a different end-of-sequence token may decode further.
        """
        tokens, where = record.get("tokens") or {}, getattr(record, "where", "")
        if not isinstance(tokens, Mapping):
            raise DataError(f"field 'tokens' is {type(tokens).__name__}, expected an object", where)
        for part in ("prompt", "completion"):
            if (ids := tokens.get(part)) is None:
                continue
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise DataError(f"tokens.{part} is not a list of ids", where)
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                what = f"tokens.{part} contains ids beyond the vocabulary of {self.name}"
                raise DataError(what, where)
        ids, text = tokens.get("completion"), record.get("completion")
        if ids is None or not isinstance(text, str):
            return tokens
        if not self.decode(ids).strip().startswith(text.strip()):
            raise DataError(
                f"its tokens do not read as its completion by the tokenizer of {self.name}: they "
                "are another model's, or the text was changed; without 'tokens' the text counts",
                where,
            )
        return tokens

    def pictures(self, record: Mapping[str, Any]) -> list[Picture]:
        """The images of a record.

        Raises:
            DataError: the model takes none, or they are not those that it was sampled with.
        """
        if not image_sources(record):
            return []
        if self.vision is None:
            raise DataError(f"the record has images, and {self.name} takes none")
        pictures = self.vision.pictures(record)
        sampled = (record.get("rollout") or {}).get("images")
        if sampled is not None and sampled != [picture.digest for picture in pictures]:
            raise DataError("its images are not those that the completion was sampled with")
        return pictures

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, nothing added; raises DataError if a character has no token."""
        return text_ids(self.tokenizer, text, self.name)

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a text with the special tokens that the tokenizer puts around a text."""
        return text_ids(self.tokenizer, text, self.name, special=True)

    def encode_context(self, text: str) -> list[int]:
        """Ids of a text to be continued, with only the special tokens before it."""
        return context_ids(self.tokenizer, text, self.name)

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first token that ends a completion, without special tokens."""
        length = self.length(ids)
        kept = [i for i in ids[:length] if i not in self.ends]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def check_same_tokens(first: Policy, second: Policy, ids: Iterable[int]) -> None:
    """Raise UsageError if one of these ids, which both models read, means different tokens."""
    used = sorted(set(ids))
    tokens = (policy.tokenizer.convert_ids_to_tokens(used) for policy in (first, second))
    for number, here, there in zip(used, *tokens, strict=True):
        if here != there or number >= min(first.vocab_size, second.vocab_size):
            raise UsageError(
                f"{first.name} and {second.name} have different tokenizers (id {number} is "
                f"{here!r} in one, {there!r} in the other), and are to read the same ids: take "
                "models with the same tokenizer"
            )


def cache_argument(model: nn.Module) -> str:
    """The name of a model's argument for a cache: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
