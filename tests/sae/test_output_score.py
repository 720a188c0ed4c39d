"""Features by what they do: the words of a value, the estimate, the effect, the choice."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from small_world import word_policy
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import edited_blocks
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, dump
from dlmctl.sae.corpus import MaskLaw, documents
from dlmctl.sae.evaluation.evaluate import PlacedSae
from dlmctl.sae.evaluation.halves import halves
from dlmctl.sae.evaluation.output_choice import OutputStudy, output_rows
from dlmctl.sae.evaluation.output_score import log_masses, probabilities, slopes, step
from dlmctl.sae.evaluation.sentences import collect
from dlmctl.sae.evaluation.value_words import value_words
from dlmctl.sae.formats.folders import SavedSae, write_sae
from dlmctl.sae.steering.steered_policy import SteeredPolicy
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.probing import Probing
from dlmctl.settings.steering import Steering
from dlmctl.tasks.sources import prompts

LATENTS = 12
LAYER = 0


def random_sae():
    sae = TopKSae(16, LATENTS, 3).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in sae.parameters():
        parameter.normal_(generator=generator)
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    sae.b_dec.zero_()
    return sae


def digit_records(count=40):
    """Two sentences of three digits each: 0 and 1 say low, 2 and 3 high, and 4 says nothing."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for number in range(count):
        text, spans = "", []
        for sentence in range(2):
            high = bool((number // 2 + sentence) % 2)
            digits = torch.randint(0, 3, (3,), generator=generator).tolist()
            text += "".join("401"[d] if not high else "423"[d] for d in digits)
            spans.append({"start": len(text) - 3, "end": len(text), "level": "lh"[high]})
        records.append(Record(id=str(number), prompt="=", completion=text, sentences=spans))
    return records


def world(family="llada", wanted=None, **probing):
    policy = tiny_policy(family)
    stream = documents(digit_records(), policy, 99)
    placed = PlacedSae("saes/x", random_sae(), LAYER, "all")
    labelled = collect(stream, policy, [(LAYER, "all")], MaskLaw(0.5, 0.5, seed=1), 7)
    found = labelled.tokens[LAYER, "all"], labelled.document, labelled.values
    both = halves(*found, policy.device, wanted)
    return OutputStudy(policy, placed, labelled, both, Probing(measure="output", **probing))


def by_hand(study, feature, half):
    """q before and after a step, place by place, each text in a pass of its own."""
    policy, sae = study.policy, study.placed.sae
    kind = "mask" if policy.diffusion else "all"
    edit = step(sae, sae.W_dec[feature], study.probing.amplitude)
    found = {}
    for places in study.texts[half].batches:
        for row, document in enumerate(places.part.batch.documents):
            wanted = torch.tensor([d is document for d in places.part.batch.documents])
            batch = places.part.rows(wanted).batch
            counts = batch.selected(kind)[0] & (places.part.sentence[row] >= 0)
            for column in counts.nonzero()[:, 0].tolist():
                if document.ids[column] not in {t for w in study.words for t in w}:
                    continue
                probabilities = []
                for edits in ({}, {LAYER: edit}):
                    with torch.no_grad(), edited_blocks(policy, edits):
                        there = torch.tensor([0]), torch.tensor([column])
                        logits = policy.predict(batch.masked_ids, batch.valid, *there)[0]
                    chances = logits.softmax(dim=-1)
                    probabilities.append([float(chances[w].sum()) for w in study.words])
                found[document.number, column] = probabilities
    return torch.tensor(list(found.values())), [number for number, _ in found]


def test_words_of_a_value_are_the_tokens_that_tell_it():
    study = world()
    named = dict(zip(study.halves.names, study.words, strict=True))
    encode = study.policy.encode_text
    assert named == {("level", "l"): encode("01"), ("level", "h"): encode("23")}


def test_a_token_that_is_too_rare_to_tell_a_value_is_no_word():
    policy = tiny_policy()
    [record] = digit_records(1)
    rare = Record(id="x", prompt="=", completion="=04", sentences=[
        {"start": 0, "end": 3, "level": "l"},
    ])  # fmt: skip
    few = [rare, *digit_records(8)]
    labelled = collect(documents(few, policy, 99), policy, [], MaskLaw(seed=1), 7)
    names = [("level", "l"), ("level", "h")]
    # 5 texts of even number, half of them low: 0.5^5 is above 0.01 / 6.
    assert value_words(labelled, names, "corpus", policy) == {name: [] for name in names}
    with pytest.raises(DataError, match="records of the task concepts"):
        value_words(labelled, names, "task", policy)
    assert record["sentences"][0]["level"] == "l"


def test_a_step_is_that_of_steering(tmp_path):
    policy, sae = tiny_policy(), random_sae()
    write_sae(SavedSae(sae, {"dlm_layer": LAYER}), tmp_path / "s")
    sampler = SamplerConfig(gen_length=4, block_length=4, steps=4)
    steering = Steering([f"{tmp_path}/s:5=1.7"])
    [expected] = SteeredPolicy(policy, sampler, steering).edits().values()
    output = torch.randn(2, 5, 16, dtype=torch.float64)
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, -1, -1]])
    found = step(sae.double(), sae.W_dec[5].double(), 1.7)(output, ids)
    torch.testing.assert_close(found, expected(output, ids))
    assert torch.equal(found[1, 3:], output[1, 3:])


@pytest.mark.parametrize("family", ["llada", "dream", "ar", "bd3lm"])
def test_the_estimate_is_the_slope_at_amplitude_zero(family):
    study = world(family)
    policy, sae, texts = study.policy, random_sae().double(), study.texts[0]
    slope = slopes(policy, sae, LAYER, texts, study.words)
    for feature in (2, 9):

        def total(amplitude, feature=feature):
            edit = step(sae, sae.W_dec[feature], amplitude)
            after = probabilities(policy, texts, study.words, {LAYER: edit})
            return (after.log() * texts.counts).sum(dim=0)

        difference = (total(1e-4) - total(-1e-4)) / 2e-4
        torch.testing.assert_close(slope @ sae.W_dec[feature], difference, rtol=1e-4, atol=1e-6)


def test_masses_are_sums_of_probabilities():
    policy = tiny_policy()
    states = torch.randn(3, 16, dtype=torch.float64)
    chances = policy.logits(states).softmax(dim=-1)
    found = log_masses(policy, states, [[1, 4], [2]]).exp()
    torch.testing.assert_close(found, torch.stack([chances[:, [1, 4]].sum(1), chances[:, 2]], 1))


@pytest.mark.parametrize("family", ["llada", "ar"])
def test_effects_are_means_over_words_of_the_concept(family):
    study = world(family, amplitude=2.0)
    for half in (0, 1):
        masses, numbers = by_hand(study, 4, half)
        assert sorted(numbers) == sorted(study.texts[half].document.tolist())
        assert all(number % 2 == half for number in numbers)
        changes = study.changes(study.placed.sae.W_dec[4], half)
        expected = masses[:, 1] - masses[:, 0]
        means = study.means(changes, half)
        torch.testing.assert_close(means.float(), expected.mean(dim=0), atol=1e-5, rtol=1e-3)
    estimate = study.effect(changes, 1)
    assert estimate.value == pytest.approx(float(means[1]))
    by_text = (
        torch.zeros(40)
        .double()
        .index_add(0, study.texts[1].document, changes[:, 1] - changes[:, 1].mean())
    )
    texts = len(study.texts[1].document.unique())
    error = (by_text.square().sum() * texts / (texts - 1)).sqrt() / len(changes)
    assert estimate.error(study.texts[1].document) == pytest.approx(float(error))


def test_words_of_values_that_are_not_asked_for_are_places_too():
    both, alone = world(), world(wanted={"level": ["h"]})
    assert alone.words == [both.words[both.halves.names.index(("level", "h"))]]
    for half in (0, 1):
        row = both.placed.sae.W_dec[3]
        expected = both.means(both.changes(row, half), half)
        place = both.halves.names.index(("level", "h"))
        assert float(alone.means(alone.changes(row, half), half)) == pytest.approx(
            float(expected[place])
        )


def test_the_choice_is_the_best_of_all_if_all_are_measured():
    study = world(candidates=LATENTS)
    rows = [r for r in output_rows(study, seed=0) if r["method"] == "sae" and "value" in r]
    every = torch.stack([study.means(study.changes(row, 0), 0) for row in study.placed.sae.W_dec])
    for row in rows:
        column = [value for _, value in study.halves.names].index(row["value"])
        assert row["measured"] == LATENTS
        effect = every[row["feature"], column]
        assert row["first_half_effect"] == pytest.approx(float(effect))
        assert row["output_rank"] == 1 + int((every[:, column] > effect).sum())
        assert (row["output_rank"] == 1) >= (row["chosen_by"] == "output")
        assert (row["auroc_rank"] == 1) >= (row["chosen_by"] == "auroc")
    assert [r["chosen_by"] for r in rows] == ["output"] * 2 + ["auroc"] * 2


def test_few_candidates_are_those_of_the_largest_estimates_and_the_best_by_auroc():
    rows = [r for r in output_rows(world(candidates=1), seed=0) if "value" in r]
    for method in ("sae", "random"):
        of_method = [r for r in rows if r["method"] == method]
        assert {r["measured"] for r in of_method} <= {2, 3, 4}  # of two values, one and one each
        assert all(r["output_rank"] == 1 for r in of_method if r["chosen_by"] == "output")
        assert all(r["auroc_rank"] == 1 for r in of_method if r["chosen_by"] == "auroc")
    assert [r["chosen_by"] for r in rows if r["method"] == "means"] == [None, None]
    only = output_rows(world(candidates=1, choose="auroc"), seed=0)
    assert {r["chosen_by"] for r in only} == {"auroc", None}


@pytest.fixture
def study_folder(tmp_path, monkeypatch):
    policy = tiny_policy()
    save_policy(policy, tmp_path / "model")
    write_sae(SavedSae(random_sae(), {"dlm_layer": LAYER, "dlm_positions": "mask"}), tmp_path / "s")
    (tmp_path / "t.jsonl").write_bytes(b"".join(map(dump, digit_records())))
    monkeypatch.chdir(tmp_path)


def run(line):
    return CliRunner().invoke(app, line.split())


def test_the_row_of_a_feature_is_all_that_steering_needs(study_folder):
    done = run(
        "sae-probe s t.jsonl -m model --t 0.5 --measure output --choose output --amplitude 2"
        " --concept level=h"
    )
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["value"] for r in rows if "value" in r} == {"h"}
    row = rows[0]
    assert (row["method"], row["chosen_by"], row["t"]) == ("sae", "output", [0.5, 0.5])
    assert row["words"] == ["2", "3"]
    assert row["steer"] == f"s@0:{row['feature']}=2.0"
    Path("p.jsonl").write_text('{"id":1,"prompt":"="}\n')
    steered = run(f"rollout p.jsonl -m model -n 1 --steer {row['steer']}")
    assert steered.exit_code == 0, steered.stderr
    assert json.loads(steered.stdout)["rollout"]["steer"][0]["feature"] == row["feature"]


@pytest.mark.parametrize("measure", ["sparse", "tpp", "scr"])
def test_measures_of_sentences_are_asked_for_by_name(study_folder, measure):
    done = run(f"sae-probe s t.jsonl -m model --t 0.5 --measure {measure} --top 1,3")
    if measure == "sparse":
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {r["top"] for r in rows} == {1, 3, None}
    else:  # there is one concept, of two values
        assert done.exit_code == 65


@pytest.mark.parametrize("options", ["--top 0", "--amplitude 0", "--concept x= ", "--concept =3"])
def test_options_that_make_no_sense_are_refused(study_folder, options):
    assert run(f"sae-probe s t.jsonl -m model --measure output {options}").exit_code == 2


def test_words_of_the_task_are_within_its_expressions():
    policy = word_policy()
    stream = documents(prompts("concepts", limit=150), policy, 2048)
    labelled = collect(stream, policy, [], MaskLaw(seed=1), 16)
    names = [("tense", "past"), ("tense", "future"), ("number", "plural")]
    for source, other in (("corpus", True), ("task", False)):
        words = value_words(labelled, names, source, policy)
        texts = [{policy.decode([token]) for token in words[name]} for name in names]
        assert {"yesterday", "ago"} <= texts[0]
        assert ("was" in texts[0]) == other  # of a past sentence, and no time
        assert "next" in texts[1]
        assert {"these", "those"} & texts[2]
        assert "the" not in texts[0] | texts[1] | texts[2]
