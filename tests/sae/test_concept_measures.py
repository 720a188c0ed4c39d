"""Sparse probing, targeted probe perturbation and spurious correlation removal."""

import itertools

import pytest
import torch

from dlmctl.records.errors import DataError, UsageError
from dlmctl.report.auroc import auroc
from dlmctl.sae.evaluation.halves import halves
from dlmctl.sae.evaluation.perturbation import tpp_rows
from dlmctl.sae.evaluation.sentence_codes import dictionaries, signed_weights, strongest
from dlmctl.sae.evaluation.sentences import Tokens
from dlmctl.sae.evaluation.sparse import sparse_rows
from dlmctl.sae.evaluation.spurious import scr_rows
from dlmctl.sae.logistic import fit_probe
from dlmctl.sae.topk import TopKSae

WIDTH = 12
COLOURS, SIZES = ("red", "green", "blue"), ("big", "small")


def planted(documents=60, noise=0.3, seed=0):
    """Each value adds a direction of its own to the tokens of its sentences, three a sentence."""
    generator = torch.Generator().manual_seed(seed)
    values, document = [], []
    for number in range(documents):
        for _ in range(4):
            drawn = torch.randint(0, 6, (1,), generator=generator).item()
            values.append({"colour": COLOURS[drawn % 3], "size": SIZES[drawn // 3]})
            document.append(number)
    sentence = torch.arange(len(values)).repeat_interleave(3)
    states = noise * torch.randn(len(sentence), WIDTH, generator=generator)
    for axis, (name, value) in enumerate(names()):
        has = torch.tensor([v[name] == value for v in values])
        states[:, axis] += 2 * has[sentence]
    found = Tokens(states, sentence), torch.tensor(document), values
    return halves(*found, torch.device("cpu"), {"colour": COLOURS, "size": SIZES})


def names():
    return [("colour", c) for c in COLOURS] + [("size", s) for s in SIZES]


def exact_sae():
    """Latent j is coordinate j."""
    sae = TopKSae(WIDTH, WIDTH, 4).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(WIDTH))
    sae.W_dec.copy_(torch.eye(WIDTH))
    return sae


def random_sae(latents=30, k=4, seed=0):
    torch.manual_seed(seed)
    sae = TopKSae(WIDTH, latents, k).requires_grad_(False)
    sae.W_enc.normal_()
    sae.b_dec.normal_(0, 0.1)
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(latents, WIDTH), dim=1))
    return sae


def test_latents_of_a_sentence_are_means_over_its_tokens():
    both, sae = planted(), random_sae()
    [trained, untrained] = dictionaries(sae, both, seed=1)
    dense = sae.encode(both.first.states).dense(30).double()
    means = torch.stack(
        [dense[both.first.sentence == s].mean(dim=0) for s in range(len(both.first.document))]
    )
    wanted = torch.tensor([7, 0, 29])
    torch.testing.assert_close(trained.first.means(wanted), means[:, wanted])
    present = both.first.present[1]
    difference = means[present].mean(dim=0) - means[~present].mean(dim=0)
    torch.testing.assert_close(trained.first.weighted(signed_weights(present)), difference)
    # The untrained dictionary has as many latents, of which as many are active.
    assert untrained.directions.shape == (30, WIDTH)
    active = [
        (one.first.codes.values > 0).double().sum(dim=1).mean() for one in (trained, untrained)
    ]
    assert active[0] == pytest.approx(float(active[1]), abs=0.5)


def test_ablation_removes_latents_and_keeps_the_error_of_every_token():
    both, sae = planted(), random_sae()
    [trained, _] = dictionaries(sae, both, seed=1)
    features, states = torch.tensor([3, 11, 12]), both.second.states
    dense = sae.encode(states).dense(30)
    error = states - (dense @ sae.W_dec + sae.b_dec)
    dense[:, features] = 0
    expected = both.second.means(dense @ sae.W_dec + sae.b_dec + error)
    found = trained.ablated(both.second_means, features)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_strongest_latents_are_those_whose_effect_is_not_zero():
    effects = torch.tensor([0.0, 2.0, -1.0, 3.0, 0.0])
    assert strongest(effects, 2).tolist() == [3, 1]
    assert strongest(effects, 9).tolist() == [3, 1, 2]


def test_one_latent_is_enough_for_a_value_that_has_its_own():
    rows = list(sparse_rows(exact_sae(), planted(), [1, 3], seed=0))
    of_values = [r for r in rows if "value" in r]
    assert len(of_values) == 5 * (3 * 2 + 1)
    for axis, (concept, value) in enumerate(names()):
        [one] = [
            r
            for r in of_values
            if (r["concept"], r["value"], r["method"], r["top"]) == (concept, value, "sae", 1)
        ]
        # Of two sizes one latent tells as much as the other.
        assert one["features"] == [axis] if concept == "colour" else one["features"][0] in (3, 4)
        assert one["accuracy"] > 0.98
        assert one["above_random"] >= 0
    summaries = {(r["method"], r["top"]): r for r in rows if "values" in r}
    assert set(summaries) == {
        *itertools.product(("sae", "random", "neurons"), (1, 3)),
        ("dense", None),
    }
    mean = [r["accuracy"] for r in of_values if (r["method"], r["top"]) == ("random", 3)]
    assert summaries["random", 3]["accuracy"] == pytest.approx(sum(mean) / 5)
    difference = summaries["sae", 1]["accuracy"] - summaries["random", 1]["accuracy"]
    assert summaries["sae", 1]["above_random"] == pytest.approx(difference)


def test_sparse_probes_are_chosen_and_fitted_on_one_half_and_measured_on_the_other():
    both, sae = planted(noise=3.0), random_sae()
    first, second = (
        half.means(sae.encode(half.states).dense(30).double()) for half in (both.first, both.second)
    )
    rows = [r for r in sparse_rows(sae, both, [5], seed=0) if r["method"] == "sae"]
    for place, row in enumerate(rows[:-1]):
        present = both.first.present[place]
        gap = (first[present].mean(dim=0) - first[~present].mean(dim=0)).abs()
        chosen = gap.topk(5).indices
        assert sorted(row["features"]) == sorted(chosen.tolist())
        scores = fit_probe(first[:, chosen], present).scores(second[:, chosen])
        there = both.second.present[place]
        right = (scores > 0) == there
        balanced = (right[there].double().mean() + right[~there].double().mean()) / 2
        assert row["accuracy"] == pytest.approx(float(balanced))
        expected = auroc(scores[None], there[None])
        assert row["auroc"] == pytest.approx(float(expected), abs=1e-6)


def test_ablating_the_only_latent_of_a_value_leaves_its_probe_to_chance_and_no_other():
    rows = list(tpp_rows(exact_sae(), planted(), [1, 2], seed=0))
    of_values = [r for r in rows if "value" in r]
    assert {r["concept"] for r in of_values} == {"colour"}  # with two values TPP says nothing
    for row in of_values:
        if row["method"] == "sae" and row["top"] == 1:
            assert row["intended"] > 0.3
            assert row["tpp"] > 0.3
            assert row["tpp"] == pytest.approx(row["intended"] - row["unintended"])
    mean = [r["tpp"] for r in of_values if (r["method"], r["top"]) == ("random", 2)]
    [summary] = [r for r in rows if "values" in r and (r["method"], r["top"]) == ("random", 2)]
    assert summary["tpp"] == pytest.approx(sum(mean) / 3)
    assert summary["tpp"] < 0.15


def test_perturbation_is_as_it_is_defined():
    both, sae = planted(noise=1.5), random_sae()
    first, second = (
        half.means(sae.encode(half.states).dense(30).double()) for half in (both.first, both.second)
    )

    def accuracy(probe, x, present):
        right = (x @ probe.weight + probe.bias > 0) == present
        return float(right[present].double().mean() + right[~present].double().mean()) / 2

    falls = {}
    for a, b in itertools.product(range(3), repeat=2):
        present = both.first.present[a]
        gap = (first[present].mean(dim=0) - first[~present].mean(dim=0)).clamp(min=0)
        effect = gap * (sae.W_dec.double() @ both.probes[a].weight)
        best = sorted(range(30), key=lambda j: -float(effect[j]))[:4]
        ablated = both.second_means - second[:, best] @ sae.W_dec[best].double()
        there = both.second.present[b]
        before = accuracy(both.probes[b], both.second_means, there)
        falls[a, b] = before - accuracy(both.probes[b], ablated, there)
    rows = [r for r in tpp_rows(sae, both, [4], seed=0) if r["method"] == "sae"]
    for a in range(3):
        others = [falls[a, b] for b in range(3) if b != a]
        assert rows[a]["tpp"] == pytest.approx(falls[a, a] - sum(others) / 2)


def test_the_spurious_concept_is_removed_by_its_own_latents():
    rows = list(scr_rows(exact_sae(), planted(documents=120, noise=0.8), [2], seed=0))
    by_target = {r["concept"]: r for r in rows if r["method"] == "sae" and "main" in r}
    assert set(by_target) == {"colour", "size"}
    assert sum(r["main"] for r in by_target.values()) == 1
    for row in by_target.values():
        assert row["biased"] < row["unbiased"] - 0.05
        expected = (row["accuracy"] - row["biased"]) / (row["unbiased"] - row["biased"])
        assert row["scr"] == pytest.approx(expected)
        assert row["scr"] > 0.7
    assert by_target["colour"]["values"] == ["red", "green"]
    [summary] = [r for r in rows if r["method"] == "sae" and "pairs" in r]
    [main] = [r for r in by_target.values() if r["main"]]
    assert summary["scr"] == pytest.approx(main["scr"])


def test_removal_is_as_it_is_defined():
    both, sae = planted(documents=120, noise=1.0, seed=4), random_sae()
    codes = both.first.means(sae.encode(both.first.states).dense(30).double())
    others = both.second.means(sae.encode(both.second.states).dense(30).double())

    def crossed(half):
        return (half.present[0] | half.present[1]).nonzero()[:, 0]

    here, there = crossed(both.first), crossed(both.second)
    red, big = (both.first.present[n, here] for n in (0, 3))
    x, z, y = both.first_means[here], codes[here], both.second_means[there]
    biased = fit_probe(x[red == big], red[red == big])
    clean = {c: fit_probe(x, label, red * 2 + big.long()) for c, label in ((0, red), (1, big))}
    cells = [(red == a) & (big == b) for a in (True, False) for b in (True, False)]
    means = [z[cell].mean(dim=0) for cell in cells]
    gap = (means[0] + means[2] - means[1] - means[3]) / 2  # big and small
    effect = (gap * (sae.W_dec.double() @ clean[1].weight)).abs()
    best = effect.topk(3).indices
    ablated = y - others[there][:, best] @ sae.W_dec[best].double()
    wanted = [both.second.present[n, there] for n in (0, 3)]

    def accuracy(probe, rows):
        right = ((rows @ probe.weight + probe.bias > 0) == wanted[0]).double()
        parts = [(wanted[0] == a) & (wanted[1] == b) for a in (True, False) for b in (True, False)]
        return sum(float(right[part].mean()) for part in parts) / 4

    before, after, best_case = accuracy(biased, y), accuracy(biased, ablated), accuracy(clean[0], y)
    [row] = [
        r
        for r in scr_rows(sae, both, [3], seed=0)
        if r["method"] == "sae" and r.get("concept") == "colour"
    ]
    assert [row["biased"], row["accuracy"], row["unbiased"]] == pytest.approx(
        [before, after, best_case]
    )
    assert row["scr"] == pytest.approx((after - before) / (best_case - before))
    assert row["scr_se"] > 0


def test_concepts_that_a_measure_cannot_be_taken_of_are_refused():
    tokens = Tokens(torch.randn(8, WIDTH), torch.arange(8))
    values = [{"size": SIZES[n % 2]} for n in range(8)]
    document = torch.arange(8) // 2
    both = halves(tokens, document, values, torch.device("cpu"))
    with pytest.raises(DataError, match="three values"):
        list(tpp_rows(exact_sae(), both, [1], seed=0))
    with pytest.raises(DataError, match="two concepts"):
        list(scr_rows(exact_sae(), both, [1], seed=0))
    with pytest.raises(UsageError, match=r"--concept size=big,huge: .*; it has size=big"):
        halves(tokens, document, values, torch.device("cpu"), {"size": ["big", "huge"]})
    with pytest.raises(UsageError, match="--concept colour: "):
        halves(tokens, document, values, torch.device("cpu"), {"colour": []})
