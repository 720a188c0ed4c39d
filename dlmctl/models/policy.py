"""A policy: a model that denoises (or predicts the next token), its tokenizer, and what it means.

The rest of the package knows models only through this. `shift` is where the logits of a token
stand: 0 at the token itself (LLaDA, masked LMs), 1 at the token before it (Dream, autoregressive).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from shutil import which
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.models.prompting import context_ids, prompt_ids, text_ids
from dlmctl.models.vision import Picture, Vision
from dlmctl.records.errors import DataError, UnavailableError, UsageError
from dlmctl.records.jsonl import Record, field
from dlmctl.settings.models import Family, Prompting
from dlmctl.tasks.images import image_sources

COMPILER = "inductor"
"""Backend of torch.compile."""

LEFT_TO_RIGHT = ("ar", "vlm")
"""Families that predict the next token; the others denoise."""


def usual_shift(family: Family) -> int:
    """The shift of a family's models, as a rule."""
    return int(family in (*LEFT_TO_RIGHT, "dream"))


@dataclass(frozen=True)
class Policy:
    """A loaded model."""

    model: nn.Module
    tokenizer: Any
    family: Family
    mask_id: int | None
    """Token that stands for "not decided yet"; None for an autoregressive model."""
    eos_id: int | None
    """The end-of-sequence token that completions are filled up with."""
    pad_id: int
    shift: int
    """The logits of position i are found at position i - shift."""
    vocab_size: int
    name: str
    """What it was loaded by: a hub name or a path."""
    revision: str
    """Hash of the weights."""
    sampling: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The model's own gen_length, block_length and steps, where it has any."""
    vision: Vision | None = None
    """How it takes images, if it does."""
    prompting: Prompting = dataclasses.field(default_factory=Prompting)
    other_ends: frozenset[int] = frozenset()
    """Further tokens that end a completion, as generation_config.json names them."""
    turn_ends: frozenset[int] = frozenset()
    """Tokens that end a turn and not the completion, as LLaDA's <|eot_id|>."""

    @property
    def diffusion(self) -> bool:
        """Whether it denoises; otherwise it is autoregressive."""
        return self.family not in LEFT_TO_RIGHT

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end a completion."""
        return self.other_ends if self.eos_id is None else self.other_ends | {self.eos_id}

    def length(self, tokens: Sequence[int]) -> int:
        """How many tokens there are up to and including the first that ends a completion."""
        ends = self.ends
        return next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return int(self.core.config.get_text_config().hidden_size)

    @property
    def core(self) -> nn.Module:
        """The Hugging Face model itself, its adapter's layers in place."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def hidden(
        self,
        ids: Tensor,
        attention: Tensor | None,
        positions: Tensor | None = None,
        cache: Any = None,
        compiled: bool = False,
        pictures: Sequence[Sequence[Picture]] = (),
    ) -> Tensor:
        """Last hidden states.

        Args:
            ids: int64 [B, T], padding on the right.
            attention: bool [B, T], true for tokens that are there; None without padding. With a
                cache [B, S] for the S tokens that it gives.
            positions: int64 [B, T], or [3, B, T] in three dimensions, where the tokens stand; None:
                from 0 on, or as the pictures have it.
            cache: a transformers Cache that gives keys and values of other tokens.
            compiled: by torch.compile, made at the first call.
            pictures: the images of each row, for a model that takes any.

        Returns:
            [B, T, H] in the dtype of the model.
        """
        body: Any = getattr(self.core, self.core.base_model_prefix)
        call = compiled_forward(body) if compiled else body
        extra: dict[str, Any] = {"use_cache": False} if self.core.can_generate() else {}
        mask = None if attention is None else attention.long()
        if cache is not None:
            extra |= {cache_argument(body): cache}
            if attention is not None:  # as it is to be: the model would derive it from the cache
                mask = attention[:, None, None].expand(-1, 1, ids.shape[1], -1)
        if self.vision is not None and any(pictures):
            extra |= self.vision.inputs(self.core, pictures, ids.device)
            if positions is None:
                positions = self.vision.places(self.core, ids, attention, pictures)
        if positions is not None:
            extra |= {"position_ids": positions}
        return call(input_ids=ids, attention_mask=mask, **extra).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] for hidden states [N, H]."""
        head = self.head
        return head.projection(head.transform(states))

    @property
    def head(self) -> Head:
        """What stands between the last hidden states and the logits."""
        return output_head(self.core)

    def source(self, positions: Tensor) -> Tensor:
        """Where the logits of these positions are found."""
        return (positions - self.shift).clamp(min=0)

    def predict(
        self, ids: Tensor, attention: Tensor | None, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """Logits [N, V] of the tokens at (rows, positions), int64 [N] each, and of no others."""
        states = self.hidden(ids, attention)
        return self.logits(states[rows, self.source(positions)])

    def encode(self, record: Mapping[str, Any]) -> list[int]:
        """The ids of a record's prompt: `tokens.prompt` as it is, else `messages` or `prompt`.

        A prompt is written as `prompting` says.

        Raises:
            DataError: there is no prompt, the tokenizer cannot express it, or the ids are of
                another one.
        """
        return self._prompt(record, self._own_tokens(record))

    def encode_completion(self, record: Record) -> list[int]:
        """The ids of a record's completion: `tokens.completion` as it is, else of the text.

        Raises:
            DataError: there is none, the tokenizer cannot express it, or the ids are of another
                one.
        """
        return self._completion(record, self._own_tokens(record))

    def encode_both(self, record: Record) -> tuple[list[int], list[int]]:
        """`encode` and `encode_completion`, the tokens looked at once."""
        own = self._own_tokens(record)
        return self._prompt(record, own), self._completion(record, own)

    def _prompt(self, record: Mapping[str, Any], own: Mapping[str, Any]) -> list[int]:
        ids: list[int] | None = own.get("prompt")
        if ids:
            hidden = self.vision is not None and self.vision.hidden
            return self.vision.without_images(ids) if self.vision and hidden else list(ids)
        pictures = self.pictures(record)
        ids = prompt_ids(
            record, self.tokenizer, self.name, self.prompting, len(pictures), self.vision
        )
        return self.vision.expand(ids, pictures) if self.vision else ids

    def _completion(self, record: Record, own: Mapping[str, Any]) -> list[int]:
        ids: list[int] | None = own.get("completion")
        if ids is not None:
            return ids
        return self.encode_text(field(record, "completion", str, "'dlmctl rollout' writes it"))

    def _own_tokens(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The ids that a record holds, which must be those of this tokenizer.

        Whose ids they are, the record does not say. They are known for another tokenizer's where
        they do not read as the text that was decoded from them; or begin so, since a model with
        another end-of-sequence token may read on.
        """
        held, where = record.get("tokens") or {}, getattr(record, "where", "")
        if not isinstance(held, Mapping):
            raise DataError(f"field 'tokens' is {type(held).__name__}, expected an object", where)
        for part in ("prompt", "completion"):
            if (ids := held.get(part)) is None:
                continue
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise DataError(f"tokens.{part} is not a list of ids", where)
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                what = f"tokens.{part} holds ids beyond the vocabulary of {self.name}"
                raise DataError(what, where)
        ids, text = held.get("completion"), record.get("completion")
        if ids is None or not isinstance(text, str):
            return held
        if not self.decode(ids).strip().startswith(text.strip()):
            raise DataError(
                f"its tokens do not read as its completion by the tokenizer of {self.name}: they "
                "are another model's, or the text was changed; without 'tokens' the text counts",
                where,
            )
        return held

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
        """Ids of a text, nothing added; raises DataError where a character has no token."""
        return text_ids(self.tokenizer, text, self.name)

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a text with the special tokens that the tokenizer puts around one."""
        return text_ids(self.tokenizer, text, self.name, special=True)

    def encode_context(self, text: str) -> list[int]:
        """Ids of a text that is continued, with the special tokens before it alone."""
        return context_ids(self.tokenizer, text, self.name)

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first token that ends a completion, special tokens left out."""
        length = self.length(ids)
        kept = [i for i in ids[:length] if i not in self.ends]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def check_same_tokens(first: Policy, second: Policy, ids: Iterable[int]) -> None:
    """Raise UsageError if one of these ids, which one model reads from the other, means another
    token there."""
    used = sorted(set(ids))
    tokens = (policy.tokenizer.convert_ids_to_tokens(used) for policy in (first, second))
    for number, here, there in zip(used, *tokens, strict=True):
        if here != there or number >= min(first.vocab_size, second.vocab_size):
            raise UsageError(
                f"{first.name} and {second.name} have different tokenizers (id {number} is "
                f"{here!r} in one, {there!r} in the other), and are to read the same ids: take "
                "models with one tokenizer"
            )


def cache_argument(model: nn.Module) -> str:
    """What a Hugging Face model calls its cache: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def compiled_forward(module: nn.Module) -> Any:
    """`torch.compile` of a module's forward pass for all batch sizes and lengths; it stays with it.

    Raises:
        UnavailableError: there is no C++ compiler, which torch.compile needs.
    """
    if "compiled_forward" not in module.__dict__:
        if not any(map(which, (os.environ.get("CXX", "g++"), "clang++", "c++", "cl"))):
            raise UnavailableError("--compile needs a C++ compiler: install g++, or set CXX")
        made = torch.compile(module.forward, dynamic=True, backend=COMPILER)
        module.__dict__["compiled_forward"] = made
    return module.__dict__["compiled_forward"]


class Head(NamedTuple):
    """logits = projection(transform(hidden states))."""

    transform: Callable[[Tensor], Tensor]
    """[N, H] to [N, H]; decoders have none, BERT-like encoders a layer of their own."""
    projection: nn.Linear
    """[N, H] to [N, V]."""


def output_head(model: Any) -> Head:
    """The output head of a Hugging Face model; raises DataError for a kind not known here."""
    if isinstance(getattr(model, "lm_head", None), nn.Linear):  # decoders
        return Head(_identity, model.lm_head)
    if hasattr(getattr(model, "lm_head", None), "decoder"):  # RoBERTa
        head = model.lm_head
        return Head(
            lambda states: head.layer_norm(functional.gelu(head.dense(states))), head.decoder
        )
    if hasattr(model, "cls"):  # BERT
        return Head(model.cls.predictions.transform, model.cls.predictions.decoder)
    if hasattr(model, "head") and hasattr(model, "decoder"):  # ModernBERT
        return Head(model.head, model.decoder)
    if hasattr(model, "vocab_projector"):  # DistilBERT
        return Head(
            lambda states: model.vocab_layer_norm(model.activation(model.vocab_transform(states))),
            model.vocab_projector,
        )
    raise DataError(f"{type(model).__name__} has no output head that is known here")


def _identity(states: Tensor) -> Tensor:
    return states
