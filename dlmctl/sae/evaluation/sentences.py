"""Labelled sentences of a corpus, and the activations of their tokens.

The field `sentences` of a record is a list of objects with `start` and `end`, offsets in characters
of its `text` or `completion`, and a value for each concept. A token belongs to the sentence that
contains its last character, since in many tokenizers a word includes the space before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.blocks import block_outputs
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field
from dlmctl.sae.corpus import Document, MaskedBatch, MaskLaw, Positions, masked_corpus

Place = tuple[int, Positions]
"""A layer and the tokens that count there."""


class Tokens(NamedTuple):
    """Activations of the tokens that count at a place."""

    states: Tensor
    """[N, d] in the model's dtype, on the CPU."""
    sentence: Tensor
    """int64 [N], the number of the sentence in the corpus."""


class LabelledBatch(NamedTuple):
    """Masked texts and the sentences of their tokens."""

    batch: MaskedBatch
    sentence: Tensor
    """int64 [B, T] on the CPU, the number of the sentence in the corpus; -1 if in none."""

    def rows(self, wanted: Tensor) -> LabelledBatch:
        """Those of its texts that are true in bool [B], on the CPU."""
        documents = [d for d, chosen in zip(self.batch.documents, wanted, strict=True) if chosen]
        there = wanted.to(self.batch.ids.device)
        tensors = (tensor[there] for tensor in self.batch[1:])
        return LabelledBatch(MaskedBatch(documents, *tensors), self.sentence[wanted])


class Labelled(NamedTuple):
    """S sentences and their tokens."""

    values: list[Mapping[str, Any]]
    """For each sentence the value of each concept."""
    document: Tensor
    """int64 [S], the number of its document."""
    tokens: dict[Place, Tokens]
    batches: list[LabelledBatch]
    law: MaskLaw


def collect(
    stream: Iterable[Document],
    policy: Policy,
    places: Sequence[Place],
    law: MaskLaw,
    batch_size: int,
) -> Labelled:
    """Run the model over labelled documents; all selected activations stay in memory.

    Raises:
        DataError: a record has no labels, or labels that make no sense.
    """
    values: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    parts: dict[Place, list[Tokens]] = defaultdict(list)
    batches: list[LabelledBatch] = []
    for batch in masked_corpus(stream, policy, law, batch_size):
        sentence = torch.full_like(batch.ids, -1, device="cpu")
        for row, document in zip(sentence, batch.documents, strict=True):
            labels = sentence_labels(document.record)
            belongs = torch.tensor(token_sentences(document, policy))
            row[: len(belongs)] = belongs.where(belongs < 0, belongs + len(values))
            values += [
                {name: value for name, value in label.items() if name not in ("start", "end")}
                for label in labels
            ]
            numbers += [document.number] * len(labels)
        batches.append(LabelledBatch(batch, sentence))
        for place, tokens in _batch_tokens(batch, policy, places, sentence):
            parts[place].append(tokens)
    if not values:
        raise DataError("no records came in; there are no sentences")
    for other in values:
        if unlike := values[0].keys() ^ other.keys():
            raise DataError(f"some sentences have a value of '{min(unlike)}' and others have none")
    tokens_of = {
        place: Tokens(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))
        for place, found in parts.items()
    }
    return Labelled(values, torch.tensor(numbers), tokens_of, batches, law)


def labelled(record: Record) -> Record:
    """The record, after a check of its labels; raises DataError."""
    sentence_labels(record)
    return record


def sentence_labels(record: Record) -> list[dict[str, Any]]:
    """The labelled spans of a record; raises DataError if they are out of order or overlap."""
    labels: list[dict[str, Any]] = field(
        record, "sentences", list, "'dlmctl prompts concepts' writes it"
    )
    before = 0
    for label in labels:
        start, end = _span(label)
        if not before <= start < end:
            raise DataError(
                "field 'sentences' is no list of spans: each needs 'start' and 'end', behind the "
                "one before",
                record.where,
            )
        before = end
    return labels


def _span(label: Any) -> tuple[int, int]:
    """Its offsets, or (-1, -1) if they are not two numbers."""
    start, end = (label.get("start"), label.get("end")) if isinstance(label, dict) else (None, None)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else (-1, -1)


def token_sentences(document: Document, policy: Policy) -> list[int]:
    """For each token of a document the number of its sentence in the record, -1 if in none."""
    labels = sentence_labels(document.record)
    starts = [label["start"] for label in labels]
    places, before = [], 0
    for end in character_ends(document, policy):
        place = bisect_right(starts, end - 1) - 1
        # A token without characters, such as end-of-sequence, is in none.
        inside = end > before and place >= 0 and end <= labels[place]["end"]
        places.append(place if inside else -1)
        before = end
    return places


def document_text(record: Record) -> str:
    """The text that the labels of a record are about."""
    text = record.get("text")
    return text if isinstance(text, str) else field(record, "completion", str)


def character_ends(document: Document, policy: Policy) -> list[int]:
    """For each token the offset of its end in the labelled text; 0 before the text."""
    record, tokenizer = document.record, policy.tokenizer
    text = document_text(record)
    lead = len(record["tokens"]["prompt"])
    ids = document.ids[lead:]
    for special in (False, True) if tokenizer.is_fast else ():
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoded["input_ids"][: len(ids)] == ids:
            ends = [end for _, end in encoded["offset_mapping"][: len(ids)]]
            return [*[0] * lead, *ends][: len(document.ids)]
    # Sampled ids may differ from those that the tokenizer would choose.
    ends = [len(policy.decode(ids[:number])) for number in range(1, len(ids) + 1)]
    return [*[0] * lead, *ends][: len(document.ids)]


def _batch_tokens(
    batch: MaskedBatch, policy: Policy, places: Sequence[Place], sentence: Tensor
) -> Iterable[tuple[Place, Tokens]]:
    """The tokens of a batch that count; clean text takes a forward pass of its own."""
    for clean in (False, True):
        wanted = [place for place in places if (place[1] == "clean") == clean]
        if not wanted:
            continue
        seen = batch.clean() if clean else batch
        with torch.no_grad():
            layers = sorted({layer for layer, _ in wanted})
            outputs = block_outputs(policy, seen.rows(policy), layers)
        for layer, positions in wanted:
            counts = seen.selected(positions).cpu() & (sentence >= 0)
            states = outputs[layer][counts.to(policy.device)].cpu()
            yield (layer, positions), Tokens(states, sentence[counts])
