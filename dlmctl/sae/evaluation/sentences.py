"""Labelled sentences of a corpus, and the activations of their tokens.

A record says by `sentences` what stands where: a list of objects with `start` and `end`, offsets in
characters of its `text` or `completion`, and a value for each concept. A token belongs to the
sentence that its last character is in, since many tokenizers have the space before a word in it.
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


class Labelled(NamedTuple):
    """S sentences and their tokens."""

    values: list[Mapping[str, Any]]
    """For each sentence the value of each concept."""
    document: Tensor
    """int64 [S], the number of its document."""
    tokens: dict[Place, Tokens]


def collect(
    stream: Iterable[Document],
    policy: Policy,
    places: Sequence[Place],
    law: MaskLaw,
    batch_size: int,
) -> Labelled:
    """Run the model over labelled documents; all activations that are wanted stay in memory.

    Raises:
        DataError: a record has no labels or such as make no sense.
    """
    values: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    found: dict[Place, list[Tokens]] = defaultdict(list)
    for batch in masked_corpus(stream, policy, law, batch_size):
        sentence = torch.full_like(batch.ids, -1, device="cpu")
        for row, document in zip(sentence, batch.documents, strict=True):
            labels = sentence_labels(document.record)
            belongs = torch.tensor(token_sentences(document, policy))
            row[: len(belongs)] = belongs.where(belongs < 0, belongs + len(values))
            values += [_concepts(label) for label in labels]
            numbers += [document.number] * len(labels)
        for place, tokens in _batch_tokens(batch, policy, places, sentence):
            found[place].append(tokens)
    if not values:
        raise DataError("no records came in; there are no sentences")
    _check_alike(values)
    joined = {
        place: Tokens(torch.cat([t.states for t in parts]), torch.cat([t.sentence for t in parts]))
        for place, parts in found.items()
    }
    return Labelled(values, torch.tensor(numbers), joined)


def labelled(record: Record) -> Record:
    """The record, its labels checked; raises DataError."""
    sentence_labels(record)
    return record


def sentence_labels(record: Record) -> list[dict[str, Any]]:
    """The labelled spans of a record, in their order and apart; raises DataError otherwise."""
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
    """Its offsets; such as make no sense where they are not two numbers."""
    start, end = (label.get("start"), label.get("end")) if isinstance(label, dict) else (None, None)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else (-1, -1)


def token_sentences(document: Document, policy: Policy) -> list[int]:
    """For each token of a document the number of its sentence in the record, -1 outside of all."""
    labels = sentence_labels(document.record)
    starts = [label["start"] for label in labels]
    places, before = [], 0
    for end in _character_ends(document, policy):
        place = bisect_right(starts, end - 1) - 1
        # A token without characters, as end-of-sequence, is in none.
        inside = end > before and place >= 0 and end <= labels[place]["end"]
        places.append(place if inside else -1)
        before = end
    return places


def _character_ends(document: Document, policy: Policy) -> list[int]:
    """For each token how many characters of the labelled text end with it; 0 before the text."""
    record, tokenizer = document.record, policy.tokenizer
    text = record.get("text")
    text = text if isinstance(text, str) else field(record, "completion", str)
    lead = len(record["tokens"]["prompt"])
    ids = document.ids[lead:]
    for special in (False, True) if tokenizer.is_fast else ():
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoded["input_ids"][: len(ids)] == ids:
            ends = [end for _, end in encoded["offset_mapping"][: len(ids)]]
            return [*[0] * lead, *ends][: len(document.ids)]
    # Ids that were sampled may not be those that the tokenizer would choose.
    ends = [len(policy.decode(ids[:number])) for number in range(1, len(ids) + 1)]
    return [*[0] * lead, *ends][: len(document.ids)]


def _batch_tokens(
    batch: MaskedBatch, policy: Policy, places: Sequence[Place], sentence: Tensor
) -> Iterable[tuple[Place, Tokens]]:
    """The tokens of a batch that count; text of which nothing is hidden takes a pass of its own."""
    for clean in (False, True):
        wanted = [place for place in places if (place[1] == "clean") == clean]
        if not wanted:
            continue
        seen = batch.clean() if clean else batch
        with torch.no_grad():
            outputs = block_outputs(
                policy, seen.masked_ids, seen.attention, sorted({layer for layer, _ in wanted})
            )
        for layer, positions in wanted:
            counts = seen.selected(positions).cpu() & (sentence >= 0)
            states = outputs[layer][counts.to(policy.device)].cpu()
            yield (layer, positions), Tokens(states, sentence[counts])


def _concepts(label: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in label.items() if name not in ("start", "end")}


def _check_alike(values: Sequence[Mapping[str, Any]]) -> None:
    names = set(values[0])
    for other in values:
        if set(other) != names:
            name = min(names ^ set(other))
            raise DataError(f"some sentences have a value of '{name}' and others have none")
