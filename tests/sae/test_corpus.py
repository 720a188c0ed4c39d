"""The forward masking process over a corpus."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_policy

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.corpus import Document, MaskedBatch, MaskLaw, documents, masked_corpus, packed


def _documents(lengths: list[int], kept: int = 1) -> list[Document]:
    return [
        Document(n, [3 + (n + i) % 4 for i in range(size)], kept, Record(id=n))
        for n, size in enumerate(lengths)
    ]


def _batches(lengths: list[int], law: MaskLaw, batch_size: int, kept: int = 1) -> list[MaskedBatch]:
    return list(masked_corpus(_documents(lengths, kept), tiny_policy(), law, batch_size))


def test_hidden_and_visible_tokens_are_disjoint_and_leave_out_the_first_and_padding() -> None:
    for batch in _batches([9, 5, 12, 2, 7], MaskLaw(0.2, 0.8), 2):
        hidden, visible = batch.selected("mask"), batch.selected("unmask")
        assert not (hidden & visible).any()
        assert torch.equal(hidden | visible, batch.selected("all"))
        assert not (hidden | visible)[:, 0].any()
        assert not ((hidden | visible) & ~batch.valid).any()
        assert (batch.masked_ids[hidden] == tiny_policy().mask_id).all()
        assert torch.equal(batch.masked_ids[~hidden], batch.ids[~hidden])
        assert not batch.clean().masked.any()
        assert torch.equal(batch.clean().masked_ids, batch.ids)


def test_masks_do_not_depend_on_the_batch() -> None:
    lengths = [9, 5, 12, 2, 7, 7, 30]
    law = MaskLaw(0.1, 0.9, seed=4)

    def masks(batch_size: int) -> dict[int, list[bool]]:
        return {
            document.number: row[: len(document.ids)].tolist()
            for batch in _batches(lengths, law, batch_size)
            for document, row in zip(batch.documents, batch.masked, strict=True)
        }

    assert masks(1) == masks(3) == masks(7)
    assert list(masks(3)) != list(range(7))  # like lengths were brought together
    other = _batches(lengths, MaskLaw(0.1, 0.9, seed=5), 7)[0]
    assert other.masked.tolist() != _batches(lengths, law, 7)[0].masked.tolist()


def test_levels_have_their_range_and_tokens_are_hidden_at_them() -> None:
    batches = _batches([101] * 400, MaskLaw(0.05, 0.5), 400)
    level = batches[0].level
    assert 0.05 <= level.min() < 0.06
    assert 0.49 < level.max() <= 0.5
    share = batches[0].masked[:, 1:].double().mean(dim=1)
    error = (level * (1 - level) / 100).sqrt()
    assert ((share - level).abs() < 5 * error).all()
    assert abs(float(((share - level) / error).std()) - 1) < 0.15


def test_one_level_for_a_batch() -> None:
    batches = _batches([9] * 6, MaskLaw(per_batch=True), 3)
    levels = [set(batch.level.tolist()) for batch in batches]
    assert [len(found) for found in levels] == [1, 1]
    assert levels[0] != levels[1]


def test_prompts_stay_visible_unless_asked_for() -> None:
    policy = tiny_policy()
    records = [Record(id=1, prompt="0123", completion="44"), Record(id=2, text="0=1")]
    kept = [d.kept for d in documents(records, policy, 99)]
    assert kept == [4, 1]
    assert [d.kept for d in documents(records, policy, 99, hide_prompt=True)] == [1, 1]
    batch = _batches([9] * 50, MaskLaw(1.0, 1.0), 50, kept=4)[0]
    assert not batch.masked[:, :4].any()
    assert batch.masked[:, 4:].all()


def test_documents_are_cut_and_single_tokens_left_out() -> None:
    policy = tiny_policy()
    found = list(documents([Record(text="0"), Record(text="0123")], policy, 3))
    assert [(d.number, policy.decode(d.ids)) for d in found] == [(0, "012")]
    with pytest.raises(DataError, match="no 'text'"):
        list(documents([Record(id=1)], policy, 3))


def test_packing_loses_no_token_and_begins_every_piece_alike() -> None:
    policy = tiny_policy()
    eos = policy.eos_id
    pieces = list(packed(_documents([5, 3, 6, 4]), policy, 6))
    assert [len(p.ids) for p in pieces] == [6] * 4
    assert [p.number for p in pieces] == [0, 1, 2, 3]
    joined = [i for d in _documents([5, 3, 6, 4]) for i in [*d.ids, eos]]
    assert [i for p in pieces for i in p.ids[1:]] == joined[:20]
    assert {p.ids[0] for p in pieces} == {eos}
    [short] = packed(_documents([3]), policy, 60)
    assert short.ids == [eos, 3, 4, 5, eos]


def test_an_autoregressive_model_sees_everything() -> None:
    [batch] = masked_corpus(_documents([5, 3]), tiny_policy("ar"), MaskLaw(), 2)
    assert not batch.masked.any()
    assert torch.equal(batch.masked_ids, batch.ids)


def test_levels_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(UsageError, match="do not lie within"):
        MaskLaw(0.5, 0.2)
