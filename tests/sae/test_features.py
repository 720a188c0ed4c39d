"""Features as one pass over batches finds them, beside one document after the other."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import nearly, tiny_policy
from small_world import LATENTS, LAYER, Sight, random_sae, small_world

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.models.blocks import block_outputs
from dlmctl.models.token_text import TokenTexts
from dlmctl.records.errors import UsageError
from dlmctl.sae.corpus import MaskLaw, Positions, masked_corpus
from dlmctl.sae.features.code_batch import CodeBatch, code_batches
from dlmctl.sae.features.firing_stats import ALIVE, BINS, LEVELS, PER_OCTAVE, FiringStats
from dlmctl.sae.features.records import EFFECTS, feature_records, logit_effects
from dlmctl.sae.features.responses import Responses, collect_responses, parse_choice, select_slots
from dlmctl.sae.features.windows import LONGEST, Windows
from dlmctl.sae.topk import JumpReluSae
from dlmctl.settings.features import WindowCounts

WORLD = small_world()
COUNTS, SEED = WindowCounts(top=5, weighted=4, inactive=6, radius=4), 9
FACTS = {"sae": "here", "t": [0.1, 0.9]}
KINDS: list[Positions] = ["mask", "unmask", "all", "clean"]


@functools.cache
def records_of(
    positions: Positions, batch_size: int, latents: tuple[int, ...] | None = None
) -> list[dict[str, Any]]:
    wanted = torch.tensor(range(LATENTS) if latents is None else latents)
    stream = WORLD.stream(positions, batch_size, latents)
    responses = collect_responses(stream, wanted, COUNTS, SEED, WORLD.law.t_min, WORLD.law.t_max)
    slots = list(range(len(wanted)))
    return list(feature_records(responses, slots, WORLD.policy, WORLD.sae, FACTS))


def shown(sight: Sight, position: int, feature: int) -> dict[str, Any]:
    """A window, cut out of its document."""
    first, last = max(0, position - COUNTS.radius), position + COUNTS.radius + 1
    record = sight.document.record
    return {
        **{name: record[name] for name in ("id", "sample") if name in record},
        "position": position,
        "middle": position - first,
        "t": pytest.approx(sight.level, rel=1e-4),
        "tokens": [WORLD.policy.decode([i]) for i in sight.document.ids[first:last]],
        "masked": sight.hidden[first:last],
        "activations": pytest.approx(
            [code[feature] for code in sight.codes[first:last]], rel=1e-4, abs=1e-12
        ),
    }


def best_of_documents(sights: list[Sight], score: Any) -> list[tuple[Sight, int]]:
    """The token of highest score of each document, the best document first."""
    best = []
    for sight in sights:
        scored = [(score(sight, i), i) for i in range(len(sight.codes))]
        able = [(value, -i) for value, i in scored if value is not None]
        if able:
            value, position = max(able)
            best.append((value, -sight.document.number, sight, -position))
    return [(sight, position) for _, _, sight, position in sorted(best, key=lambda b: b[:2])[::-1]]


@pytest.mark.parametrize("positions", KINDS)
def test_rates_and_profiles_are_those_of_all_tokens(positions: Positions) -> None:
    sights = WORLD.sights(positions)
    found = records_of(positions, 7)
    tokens = [
        (s.level, code) for s in sights for code, at in zip(s.codes, s.looked_at, strict=True) if at
    ]
    assert found[0]["corpus"]["tokens"] == len(tokens)
    for feature in (0, 3, 17, 39):
        values = [(t, code[feature]) for t, code in tokens if code[feature] > 0]
        record = found[feature]
        assert record["active"] == len(values)
        assert record["firing_rate"] == pytest.approx(len(values) / len(tokens), rel=1e-4)
        assert record["max"] == pytest.approx(max((v for _, v in values), default=0), rel=1e-4)
        assert sum(record["histogram"]["counts"]) == len(values)
        edges = record["histogram"]["edges"]
        for low, high, count in zip(edges, edges[1:], record["histogram"]["counts"], strict=False):
            assert count == sum(low <= v < high for _, v in values)
        if positions == "clean":
            continue
        profile = record["time_profile"]
        for i in range(10):
            low, high = 0.1 + 0.08 * i, 0.1 + 0.08 * (i + 1)
            assert profile["edges"][i] == pytest.approx(low)
            inside = [v for t, v in values if low <= t < high]
            there = sum(low <= t < high for t, _ in tokens)
            assert profile["tokens"][i] == there
            assert profile["firing_rate"][i] == pytest.approx(len(inside) / there, rel=1e-4)
            mean = sum(inside) / len(inside) if inside else None
            assert profile["mean"][i] == (mean and pytest.approx(mean, rel=1e-4))


@pytest.mark.parametrize("positions", KINDS)
def test_top_windows_are_the_strongest_of_all(positions: Positions) -> None:
    sights = WORLD.sights(positions)
    for record in records_of(positions, 7):
        feature = record["feature"]

        def score(sight: Sight, i: int, feature: int = feature) -> float | None:
            return sight.codes[i][feature] or None

        expected = best_of_documents(sights, score)[: COUNTS.top]
        assert record["windows"]["top"] == [shown(s, i, feature) for s, i in expected]


def test_weighted_windows_are_drawn_by_their_keys_from_the_other_documents() -> None:
    sights = WORLD.sights("mask")
    for record in records_of("mask", 7):
        feature = record["feature"]
        key = key_tensor([stream_key(SEED, "weighted", feature)])

        def score(sight: Sight, i: int, feature: int = feature, key: Any = key) -> float | None:
            value = sight.codes[i][feature]
            counter = torch.tensor([sight.document.number * LONGEST + i])
            return float(uniform(key, counter).log()) / value if value > 0 else None

        top = {window["id"] for window in record["windows"]["top"]}
        others = [
            (s, i)
            for s, i in best_of_documents(sights, score)
            if s.document.record["id"] not in top
        ]
        expected = [shown(s, i, feature) for s, i in others[: COUNTS.weighted]]
        assert record["windows"]["weighted"] == expected


def test_inactive_windows_are_drawn_among_those_without_an_active_token() -> None:
    """One window of each document, all of which fit into the pool."""
    sights = WORLD.sights("mask")
    pool_key = key_tensor([stream_key(SEED, "pool")])

    def noise(sight: Sight, i: int) -> float | None:
        counter = torch.tensor([sight.document.number * LONGEST + i])
        return float(uniform(pool_key, counter)) if sight.looked_at[i] else None

    pool = best_of_documents(sights, noise)
    short, radius = 0, COUNTS.radius
    for record in records_of("mask", 7):
        feature = record["feature"]
        key = key_tensor([stream_key(SEED, "inactive", feature)])
        quiet = [
            (float(uniform(key, torch.tensor([sight.document.number]))), sight, position)
            for sight, position in pool
            if not any(
                code[feature]
                for code in sight.codes[max(0, position - radius) : position + radius + 1]
            )
        ]
        drawn = sorted(quiet, key=lambda entry: entry[0])[: COUNTS.inactive]
        assert record["windows"]["inactive"] == [shown(s, i, feature) for _, s, i in drawn]
        short += len(drawn) < COUNTS.inactive
    assert short < LATENTS / 2


def test_weighted_windows_are_drawn_in_proportion_to_the_activation() -> None:
    """A thousand features with activations 3 and 1 on one token of each of two documents."""
    count = 1000
    [batch] = masked_corpus(list(WORLD.documents())[:2], WORLD.policy, WORLD.law, 2)
    index = torch.full(batch.ids.shape, -1)
    index[:, 2] = torch.arange(2)
    slots = torch.arange(count)
    active = CodeBatch(
        batch,
        size=count,
        numbers=torch.tensor([document.number for document in batch.documents]),
        index=index,
        row=torch.arange(2),
        column=torch.tensor([2, 2]),
        slots=slots.expand(2, count),
        token=torch.arange(2).repeat_interleave(count),
        slot=slots.repeat(2),
        value=torch.tensor([3.0, 1.0]).repeat_interleave(count),
    )
    windows = Windows(slots, WindowCounts(top=1, weighted=1, radius=1), 0)
    windows.add(active)
    first = windows._weighted.number.view(count, 2)[:, 0]
    share = float((first == active.numbers[0]).double().mean())
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / count) ** 0.5


def test_counting_in_place_gives_the_bits_of_a_table_for_each_batch() -> None:
    """Also of sums: those of a batch are made apart, and then added."""
    stats, cells = FiringStats(LATENTS, 0.1, 0.9), LATENTS * LEVELS
    counts, totals = torch.zeros(cells), torch.zeros(cells, dtype=torch.float64)
    histogram = torch.zeros(LATENTS * BINS)
    for codes in WORLD.stream("mask", 7):
        stats.add(codes)
        level = ((codes.batch.level - 0.1) / (0.9 - 0.1) * LEVELS).long()[codes.row]
        cell = codes.slot * LEVELS + level[codes.token]
        counts += cell.bincount(minlength=cells)
        totals += cell.bincount(codes.value.double(), minlength=cells)
        place = (codes.value.double().log2() * PER_OCTAVE).floor().long() + BINS // 2
        histogram += (codes.slot * BINS + place).bincount(minlength=LATENTS * BINS)
    assert torch.equal(stats.level_count.flatten(), counts.long())
    assert torch.equal(stats.level_total.flatten(), totals)
    assert torch.equal(stats.histogram.flatten(), histogram.long())
    assert int(stats.histogram.sum()) == int(stats.count.sum()) > 1000


@pytest.mark.parametrize("positions", ["mask", "clean"])
def test_records_do_not_depend_on_the_batch_size_nor_on_the_features_beside(
    positions: Positions,
) -> None:
    whole = nearly(records_of(positions, 60), rel=1e-4)  # of five digits
    assert records_of(positions, 1) == whole
    assert records_of(positions, 13) == whole
    few = records_of(positions, 13, (31, 2))
    for record in few:
        del record["corpus"]
        expected = {**whole[record["feature"]]}
        del expected["corpus"]
        assert record == expected
    assert [record["feature"] for record in few] == [31, 2]


def test_names_of_documents_are_forgotten_when_nothing_of_them_is_kept() -> None:
    responses = collect_responses(
        WORLD.stream("mask", 5), torch.arange(LATENTS), COUNTS, SEED, 0.1, 0.9
    )
    windows = responses.windows
    windows._limit, texts = 0, TokenTexts(WORLD.policy.tokenizer)
    before = [windows.of(slot, texts) for slot in range(LATENTS)]
    windows._forget()
    assert [windows.of(slot, texts) for slot in range(LATENTS)] == before


def _responses() -> Responses:
    return collect_responses(
        WORLD.stream("mask", 16), torch.arange(LATENTS), COUNTS, SEED, 0.1, 0.9
    )


def test_features_are_chosen_among_those_alive() -> None:
    responses = _responses()
    responses.stats.count = torch.arange(LATENTS).flip(0) * 5 % 37
    count = responses.stats.count
    alive = [feature for feature in range(LATENTS) if count[feature] > ALIVE]

    def chosen(text: str, seed: int = 0) -> list[int]:
        return select_slots(responses, parse_choice(text, LATENTS), seed)

    assert chosen("all") == alive
    by_rate = sorted(alive, key=lambda f: -int(count[f]))
    assert [int(count[f]) for f in chosen("top:4")] == [int(count[f]) for f in by_rate[:4]]
    drawn = chosen("random:5")
    assert drawn == sorted(set(drawn) & set(alive))
    assert len(drawn) == 5
    assert drawn == chosen("random:5")
    assert len({tuple(chosen("random:5", seed)) for seed in range(5)}) > 1
    assert chosen("random:999") == alive


def test_choices_are_read_and_others_refused() -> None:
    assert parse_choice("0,3,3,1", 4).features == (0, 3, 1)
    for text in ("top", "top:0", "random:x", "some", "1,", "-1", ""):
        with pytest.raises(UsageError, match="none of random:N"):
            parse_choice(text, 4)
    with pytest.raises(UsageError, match="features 0 to 3"):
        parse_choice("4", 4)


@pytest.mark.parametrize("family", ["llada", "dream", "mlm", "ar"])
def test_logit_effects_are_the_rows_through_the_output_matrix(family: Any) -> None:
    policy = tiny_policy(family)
    texts = TokenTexts(policy.tokenizer)
    directions = random_sae().W_dec[:3].detach().double()
    weight = dict(policy.core.named_parameters()).get("lm_head.weight")
    if weight is None:  # tied
        weight = policy.core.get_output_embeddings().weight
    for row, effect in zip(directions, logit_effects(policy, directions, texts), strict=True):
        values = {texts(i): float(weight[i].detach() @ row) for i in range(policy.vocab_size)}
        order = sorted(values, key=lambda text: -values[text])
        assert [entry["token"] for entry in effect["top"]] == order[:EFFECTS]
        assert [entry["token"] for entry in effect["bottom"]] == order[::-1][:EFFECTS]
        for entry in effect["top"]:
            assert entry["logit"] == pytest.approx(values[entry["token"]], rel=1e-3, abs=1e-5)


def test_an_autoencoder_of_another_width_is_refused() -> None:
    batches = masked_corpus(WORLD.documents(), WORLD.policy, MaskLaw(), 4)
    stream = code_batches(
        batches, WORLD.policy, LAYER, random_sae(width=8), "mask", torch.arange(3)
    )
    with pytest.raises(UsageError, match="width 8, and those of"):
        next(stream)


def test_a_corpus_without_documents_has_features_that_are_never_active() -> None:
    responses = collect_responses([], torch.tensor([3]), COUNTS, SEED, 0.0, 1.0)
    [record] = feature_records(responses, [0], WORLD.policy, WORLD.sae, FACTS)
    assert record["active"] == record["firing_rate"] == 0
    assert record["windows"] == {"top": [], "weighted": [], "inactive": []}


def test_latents_with_thresholds_are_taken_as_many_as_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dlmctl.sae.chunks.NUMBERS", 5 * LATENTS)
    sae = JumpReluSae(WORLD.sae.d_in, LATENTS)
    sae.load_state_dict({**WORLD.sae.state_dict(), "threshold": torch.linspace(0, 2, LATENTS)})
    counts: set[int] = set()
    for codes in WORLD._replace(sae=sae).stream("mask", 9):
        states = block_outputs(WORLD.policy, codes.batch.rows(WORLD.policy), [LAYER])[LAYER]
        pre = (states[codes.batch.masked].float() - sae.b_dec) @ sae.W_enc + sae.b_enc
        wanted = pre.where(pre > sae.threshold, 0.0).detach()
        found = torch.zeros_like(wanted)
        found[codes.token, codes.slot] = codes.value
        torch.testing.assert_close(found, wanted)
        assert torch.equal((codes.slots < LATENTS).sum(dim=1), (wanted > 0).sum(dim=1))
        counts |= set((wanted > 0).sum(dim=1).tolist())
    assert len(counts) > 3
