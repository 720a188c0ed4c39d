"""A corpus as batches of token ids under the forward masking process.

Every sequence has a level t ~ U(t_min, t_max), and each of its tokens except the first is masked
with probability t. The first token stays, as in the published recipe, and because a model with
shifted logits cannot predict it. A prompt stays too unless it is asked for, since most models never
see a masked prompt. The mask is a pure function of the seed and the number of the sequence, not of
its neighbours (unless the level is drawn per batch, as in the published recipe).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.models.attention import NoisedRows
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import OnError, Record, each, read_records
from dlmctl.settings.corpus import Positions

WINDOW = 16
"""Batches among which sequences are sorted by length."""


@dataclass(frozen=True)
class MaskLaw:
    """The distribution of the masks."""

    t_min: float = 0.0
    t_max: float = 1.0
    per_batch: bool = False
    """One level for all sequences of a batch."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.t_min <= self.t_max <= 1:
            raise UsageError(f"levels from {self.t_min} to {self.t_max} do not lie within 0 and 1")


class CorpusPlan(NamedTuple):
    """How a corpus is cut into sequences and masked."""

    law: MaskLaw
    context: int
    pack: bool = False
    hide_prompt: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {
            "t": [self.law.t_min, self.law.t_max],
            "context": self.context,
            "pack": self.pack,
            "hide_prompt": self.hide_prompt,
        }


class Document(NamedTuple):
    """A sequence of at least two tokens."""

    number: int
    """Counted from 0 in the order of the corpus."""
    ids: list[int]
    kept: int
    """Number of tokens at the beginning that are never masked, at least 1."""
    record: Record
    """The record that it was read from; the last one of several that are packed together."""


class MaskedBatch(NamedTuple):
    """B sequences, padded on the right."""

    documents: list[Document]
    ids: Tensor
    """int64 [B, T], the text."""
    masked_ids: Tensor
    """int64 [B, T], what the model sees: the text with mask tokens."""
    masked: Tensor
    """bool [B, T]."""
    valid: Tensor
    """bool [B, T], false for padding."""
    level: Tensor
    """float64 [B], t."""

    def rows(self, policy: Policy) -> NoisedRows:
        """The rows of a pass over the masked texts.

        The tokens at the beginning that are never masked are to blocks what a prompt is.
        """
        starts = torch.tensor([document.kept for document in self.documents])
        lengths = self.valid.sum(dim=1)
        starts = starts.to(lengths.device)
        return policy.noised_rows(self.ids, self.masked_ids, self.valid, starts, lengths)

    def selected(self, positions: Positions) -> Tensor:
        """bool [B, T], the tokens of a kind; never padding or the first token."""
        later = self.valid.clone()
        later[:, 0] = False
        if positions == "mask":
            return later & self.masked
        return later & ~self.masked if positions == "unmask" else later

    def clean(self) -> MaskedBatch:
        """The same with nothing masked."""
        masked, level = torch.zeros_like(self.masked), torch.zeros_like(self.level)
        return self._replace(masked_ids=self.ids, masked=masked, level=level)


def read_documents(
    files: Sequence[str],
    policy: Policy,
    plan: CorpusPlan,
    on_error: OnError = "fail",
    repeat: bool = False,
) -> Iterator[Document]:
    """The documents of a corpus; with `repeat` over and over, unless it is a pipe."""

    def records() -> Iterator[Record]:
        empty = True
        for record in read_records(files, on_error):
            empty = False
            yield record
        while not empty and repeat and files and "-" not in files:
            yield from read_records(files, on_error)

    stream = documents(records(), policy, plan.context, plan.hide_prompt, on_error)
    return packed(stream, policy, plan.context) if plan.pack else stream


def documents(
    records: Iterable[Record],
    policy: Policy,
    context: int,
    hide_prompt: bool = False,
    on_error: OnError = "fail",
) -> Iterator[Document]:
    """The documents of records, cut to `context` tokens; those of a single token are left out.

    Args:
        records: with `tokens`, or `text`, or `prompt` (or `messages`) and `completion`.
        hide_prompt: tokens of the prompt may be masked like others.
    """

    def tokenized(record: Record) -> Record:
        copy = Record(record)
        copy.where = record.where
        prompt, rest = _token_ids(record, policy)
        copy["tokens"] = {**(record.get("tokens") or {}), "prompt": prompt, "completion": rest}
        return copy

    number = 0
    for record in each(records, tokenized, on_error):
        if "error" in record:
            continue
        prompt, rest = record["tokens"]["prompt"], record["tokens"]["completion"]
        ids = [*prompt, *rest][:context]
        if len(ids) > 1:
            yield Document(number, ids, 1 if hide_prompt else max(1, len(prompt)), record)
            number += 1


def packed(stream: Iterable[Document], policy: Policy, context: int) -> Iterator[Document]:
    """Documents joined by end-of-sequence and cut into pieces of `context` tokens.

    Each piece begins with the beginning-of-sequence token, or with end-of-sequence if the tokenizer
    has none. A shorter last piece is left out, unless it is the only one.
    """
    first = policy.tokenizer.bos_token_id
    if first is None:
        first = policy.pad_id if policy.eos_id is None else policy.eos_id
    end = first if policy.eos_id is None else policy.eos_id
    number, waiting, document = 0, [], None
    for document in stream:
        waiting += [*document.ids[document.ids[0] == first :], end]
        while len(waiting) >= context - 1:
            yield Document(number, [first, *waiting[: context - 1]], 1, document.record)
            waiting, number = waiting[context - 1 :], number + 1
    if document is not None and number == 0:
        yield Document(0, [first, *waiting], 1, document.record)


def together(stream: Iterable[Document], batch_size: int) -> Iterator[list[Document]]:
    """The documents of each batch; sequences of similar length share one."""
    source = iter(stream)
    while window := list(islice(source, WINDOW * batch_size)):
        window.sort(key=lambda document: len(document.ids))
        for first in range(0, len(window), batch_size):
            yield window[first : first + batch_size]


def masked_corpus(
    stream: Iterable[Document], policy: Policy, law: MaskLaw, batch_size: int
) -> Iterator[MaskedBatch]:
    """The batches of a corpus."""
    for number, window in enumerate(together(stream, batch_size)):
        yield mask_batch(window, policy, law, number)


def mask_batch(window: list[Document], policy: Policy, law: MaskLaw, number: int) -> MaskedBatch:
    """A batch of documents on the policy's device; for an autoregressive policy nothing is masked.

    Args:
        number: of the batch, counted from 0.
    """
    policy.check_one_mask()
    lengths = torch.tensor([len(document.ids) for document in window])
    width = int(lengths.max())
    ids = torch.full((len(window), width), policy.pad_id, dtype=torch.int64)
    for row, document in zip(ids, window, strict=True):
        row[: len(document.ids)] = torch.tensor(document.ids)
    column = torch.arange(width)
    valid = column < lengths[:, None]  # [B, T]
    if policy.mask_id is None:
        level = torch.zeros(len(window), dtype=torch.float64)
        masked, masked_ids = torch.zeros_like(valid), ids
    else:
        # The first number of a sequence is its level, the others are compared with it.
        keys = key_tensor([stream_key(law.seed, "mask", document.number) for document in window])
        numbers = uniform(keys[:, None], torch.arange(width + 1)[None])  # [B, 1 + T]
        level = numbers[:, 0]
        if law.per_batch:
            shared = key_tensor([stream_key(law.seed, "level", number)])
            level = uniform(shared, torch.zeros(1).long()).expand(len(window))
        level = law.t_min + (law.t_max - law.t_min) * level
        kept = torch.tensor([document.kept for document in window])
        masked = (numbers[:, 1:] < level[:, None]) & valid & (column >= kept[:, None])
        masked_ids = ids.masked_fill(masked, policy.mask_id)
    tensors = (tensor.to(policy.device) for tensor in (ids, masked_ids, masked, valid, level))
    return MaskedBatch(window, *tensors)


def _token_ids(record: Record, policy: Policy) -> tuple[list[int], list[int]]:
    """Ids of the prompt, which may be empty, and of what follows."""
    tokens = record.get("tokens") or {}
    if tokens.get("completion") is not None:
        prompt = policy.encode(record) if tokens.get("prompt") else []
        return prompt, policy.encode_completion(record)
    text = record.get("text")
    if isinstance(text, str):
        return [], policy.encode_whole(text)
    if "prompt" not in record and "messages" not in record:
        raise DataError("the record has no 'text', no 'tokens' and no 'prompt'", record.where)
    completion = record.get("completion", "")
    if not isinstance(completion, str):
        raise DataError("field 'completion' is not a text", record.where)
    return policy.encode(record), policy.encode_text(completion)
