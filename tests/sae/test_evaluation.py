"""The loss on insertion, and the measures on two models."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import invoke, tiny_policy

from dlmctl.commands.corpora import corpus_plan, own_model
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, parse_record
from dlmctl.sae.corpus import CorpusPlan, MaskedBatch, MaskLaw, documents, masked_corpus
from dlmctl.sae.evaluation.controls import reconstruction
from dlmctl.sae.evaluation.evaluate import Evaluation, evaluate
from dlmctl.sae.evaluation.insertion import (
    Changes,
    DocumentLosses,
    Losses,
    predicted,
    seen,
    splice,
)
from dlmctl.sae.evaluation.placed import PlacedSae
from dlmctl.sae.evaluation.stability import compare, match_decoders, stability
from dlmctl.sae.formats.folders import SavedSae, write_sae
from dlmctl.sae.topk import Codes, TopKSae
from dlmctl.settings.corpus import AS_TRAINED
from dlmctl.settings.sae import Insertion

LAW = MaskLaw(0.2, 0.8, seed=1)
CORPUS = {"t": [0.2, 0.8]}


def _batches(policy: Policy, count: int = 20) -> list[MaskedBatch]:
    texts = ["".join("01234="[(n * k * k) % 6] for k in range(5 + n % 7)) for n in range(count)]
    records = [Record(id=n, text=text) for n, text in enumerate(texts)]
    return list(masked_corpus(documents(records, policy, 99), policy, LAW, 6))


def _identity(width: int) -> TopKSae:
    """z = (relu(x), relu(-x)), which gives x back to the last bit."""
    sae = TopKSae(width, 2 * width, 2 * width)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    sae.W_enc.data, sae.W_dec.data = both.T.contiguous(), both
    return sae.double()


def _random(width: int, seed: int = 0) -> TopKSae:
    sae, generator = TopKSae(width, 40, 4), torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return sae.double()


def _row(batch: MaskedBatch, b: int) -> dict[str, Any]:
    """The fields of a batch of one document alone, still padded."""
    tensors = {name: getattr(batch, name)[b : b + 1] for name in MaskedBatch._fields[1:]}
    return {"documents": [batch.documents[b]], **tensors}


def _losses(policy: Policy, batch: MaskedBatch, sae: TopKSae | None = None) -> DocumentLosses:
    """Of one pass; an autoencoder stands in for block 0 on masked tokens."""
    view, edits = seen(policy, batch), {}
    if sae is not None:
        wanted = view.spliced("mask", keep_first=False)
        edits = {0: splice(wanted, view.keys, reconstruction(sae))}
    return predicted(policy, view, "mask", edits).losses


def _placed(sae: TopKSae, layer: int, positions: str) -> PlacedSae:
    return PlacedSae("s", sae, layer, positions)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llada", "dream", "ar"])
@pytest.mark.parametrize("scope", ["all", "matching"])
def test_an_autoencoder_that_changes_nothing_changes_no_loss(family: str, scope: str) -> None:
    policy = tiny_policy(family)  # type: ignore[arg-type]
    kinds = ("mask", "unmask", "clean") if policy.diffusion else ("all",)
    saes = [_placed(_identity(16), n, kind) for n in (0, 1) for kind in kinds]
    for row in evaluate(policy, _batches(policy), saes, Insertion(scope), CORPUS):  # type: ignore[arg-type]
        deltas = [value for name, value in row.items() if name.startswith("delta_")]
        assert {value for value in deltas if value is not None} == {0.0}
        assert row["fve"] == 1.0


@pytest.mark.parametrize("family", ["llada", "dream", "ar"])
def test_losses_are_those_of_the_whole_logits(family: str) -> None:
    policy = tiny_policy(family)  # type: ignore[arg-type]
    losses, nats, weighted = Losses(), {"mask": [], "unmask": []}, 0.0
    for batch in _batches(policy):
        losses.add_pass(_losses(policy, batch))
        with torch.no_grad():
            logits = policy.core(
                input_ids=batch.masked_ids, attention_mask=batch.valid.long(), use_cache=False
            ).logits
        for b, t in itertools.product(*map(range, batch.ids.shape)):
            if t == 0 or not batch.valid[b, t]:
                continue
            # Dream's sampler and an autoregressive model read token t from the place before it.
            place = t - 1 if family in ("dream", "ar") else t
            value = -float(logits[b, place].log_softmax(-1)[batch.ids[b, t]])
            nats["mask" if batch.masked[b, t] else "unmask"].append(value)
            weighted += value / float(batch.level[b]) if batch.masked[b, t] else 0.0
    found = losses.row()
    for kind, values in nats.items():
        wanted = sum(values) / len(values) if values else None
        assert found[f"loss_{kind}"] == (None if wanted is None else pytest.approx(wanted))
    if nats["mask"]:
        assert found["loss_mask_per_t"] == pytest.approx(weighted / len(nats["mask"]))
        tokens = sum(len(values) for values in nats.values())
        assert found["loss_nelbo"] == pytest.approx(weighted / tokens)


@pytest.mark.parametrize("family", ["llada", "ar"])
def test_a_prompt_that_is_never_masked_has_no_loss(family: str) -> None:
    policy = tiny_policy(family)  # type: ignore[arg-type]
    prompts = ["012", "4", "33210"]
    records = [Record(id=n, prompt=p, completion="0123=4") for n, p in enumerate(prompts)]
    [batch] = masked_corpus(documents(records, policy, 99), policy, LAW, 3)
    found = _losses(policy, batch)
    with torch.no_grad():
        logits = policy.core(
            input_ids=batch.masked_ids, attention_mask=batch.valid.long(), use_cache=False
        ).logits
    for b, document in enumerate(batch.documents):
        scored = [t for t in range(document.kept, len(document.ids)) if not batch.masked[b, t]]
        places = [t - 1 if family == "ar" else t for t in scored]
        values = [
            -float(logits[b, place].log_softmax(-1)[batch.ids[b, t]])
            for place, t in zip(places, scored, strict=True)
        ]
        assert document.kept == len(prompts[document.record["id"]])
        assert int(found.tokens[1, b]) == len(scored)
        assert float(found.sums[1, b]) == pytest.approx(sum(values))


def test_the_wrong_shift_measures_another_token() -> None:
    policy = tiny_policy("dream")
    batches = _batches(policy)
    right, wrong = Losses(), Losses()
    for batch in batches:
        right.add_pass(_losses(policy, batch))
        wrong.add_pass(_losses(dataclasses.replace(policy, shift=0), batch))
    assert right.row()["loss_mask"] != pytest.approx(wrong.row()["loss_mask"], rel=1e-3)


def test_matching_positions_leave_the_others_as_they_are() -> None:
    policy = tiny_policy(layers=1)  # what is put in behind the last block stays at its place
    sae = _random(16)
    batches = _batches(policy)
    placed = [_placed(sae, 0, "mask")]
    [matching] = evaluate(policy, batches, placed, Insertion("matching"), CORPUS)
    assert matching["delta_unmask"] == 0.0
    assert matching["delta_mask"] != 0.0
    [everywhere] = evaluate(policy, batches, placed, Insertion(), CORPUS)
    assert everywhere["delta_unmask"] != 0.0
    assert everywhere["delta_mask"] == pytest.approx(matching["delta_mask"])


def test_the_error_of_a_change_is_that_of_a_ratio_over_documents() -> None:
    policy = tiny_policy()
    sae = _random(16)
    batches = _batches(policy)
    batches[0].masked[1] = False  # a document without a masked token does not count
    batches[0].masked_ids[1] = batches[0].ids[1]
    [row] = evaluate(policy, batches, [_placed(sae, 0, "mask")], Insertion("matching"), {})
    changes: list[tuple[float, int]] = []
    for batch in batches:
        for b in range(len(batch.documents)):
            alone = MaskedBatch(**_row(batch, b))
            before, after = (_losses(policy, alone, one) for one in (None, sae))
            changes.append((float(after.sums[0] - before.sums[0]), int(batch.masked[b].sum())))
    changes = [(d, n) for d, n in changes if n]
    assert len(changes) == 19
    total = sum(n for _, n in changes)
    mean = sum(d for d, _ in changes) / total
    square = sum((d - mean * n) ** 2 for d, n in changes) * len(changes) / (len(changes) - 1)
    assert row["delta_mask"] == pytest.approx(mean)
    assert row["delta_mask_se"] == pytest.approx(square**0.5 / total)
    assert row["delta_mask_per_t_se"] != row["delta_mask_se"]


def test_the_error_of_a_mean_of_equal_documents_is_that_of_their_changes() -> None:
    changes, d = Changes(), [0.5, -0.25, 1.0, 0.0]
    nothing = torch.zeros(5, 2, dtype=torch.float64)
    for first in (0, 2):
        after = torch.tensor([d[first : first + 2]] * 5, dtype=torch.float64)
        tokens = torch.full_like(nothing, 3.0)
        changes.add_pair(DocumentLosses(nothing, tokens), DocumentLosses(after, tokens))
    row = changes.row()
    assert row["delta_unmask"] == pytest.approx(statistics.fmean(d) / 3)
    assert row["delta_unmask_se"] == pytest.approx(statistics.stdev(d) / 2 / 3)


def test_a_single_document_has_no_error_and_no_document_no_change() -> None:
    changes = Changes()
    assert set(changes.row().values()) == {None}
    one = torch.ones(5, 1, dtype=torch.float64)
    changes.add_pair(DocumentLosses(one, one), DocumentLosses(3 * one, one))
    assert changes.row()["delta_mask"] == 2.0
    assert changes.row()["delta_mask_se"] is None


def test_measures_do_not_depend_on_what_is_evaluated_beside_it() -> None:
    policy = tiny_policy()
    batches = _batches(policy)
    many = [_placed(_random(16, n), n % 2, kind) for n, kind in enumerate(("mask", "clean", "all"))]
    together = evaluate(policy, batches, many, Insertion(), CORPUS)
    assert together[1] == evaluate(policy, batches, many[1:2], Insertion(), CORPUS)[0]


def test_the_same_model_is_stable() -> None:
    policy = tiny_policy()
    saes = [_placed(_random(16), 1, "mask")]
    [row] = stability(policy, policy, _batches(policy), saes, Insertion(), CORPUS, saes)
    assert row["jaccard"] == pytest.approx(1.0)
    assert row["code_cosine"] == pytest.approx(1.0)
    assert row["base_fve"] == row["tuned_fve"]
    assert row["base_delta_mask"] == row["tuned_delta_mask"]
    other = tiny_policy(seed=1)
    [row] = stability(policy, other, _batches(policy), saes, Insertion(insert=False), CORPUS)
    assert row["jaccard"] < 0.9
    assert row["base_fve"] != row["tuned_fve"]


def test_codes_are_compared_by_their_sets_and_as_vectors() -> None:
    generator = torch.Generator().manual_seed(0)

    def codes() -> Codes:
        indices = torch.rand(30, 7, generator=generator).topk(3, dim=1).indices
        values = torch.rand(30, 3, generator=generator)
        return Codes(values * (values > 0.4), indices)

    first, second = codes(), codes()
    shared, either, cosine = compare(first, second)
    for n in range(30):
        a = {int(i) for i, v in zip(first.indices[n], first.values[n], strict=True) if v > 0}
        b = {int(i) for i, v in zip(second.indices[n], second.values[n], strict=True) if v > 0}
        if not a | b:
            assert cosine[n] == 1
            continue
        assert shared[n] == len(a & b)
        assert either[n] == len(a | b)
        u, v = first.dense(7)[n].double(), second.dense(7)[n].double()
        assert float(cosine[n]) == pytest.approx(float(u @ v / (u.norm() * v.norm() + 1e-30)))


def test_decoders_are_matched_whatever_their_order() -> None:
    rows = torch.nn.functional.normalize(torch.randn(3000, 8), dim=1)
    assert match_decoders(rows, rows.flip(0))["matched"] == pytest.approx(1.0, abs=1e-5)
    found = match_decoders(torch.eye(4), torch.eye(4)[:2])
    assert found == {"matched": 0.5, "matched_above": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("dlm_t_min", 0.1, "--t"),
        ("context_size", 128, "--context"),
        ("dlm_pack", True, "--pack or --no-pack"),
        ("dlm_hide_prompt", True, "--hide-prompt or --keep-prompt"),
    ],
)
def test_autoencoders_of_one_corpus_decide_how_it_is_read(
    name: str, value: float, option: str
) -> None:
    def plan(*metadata: dict[str, Any], **given: Any) -> CorpusPlan:
        saved = {str(n): SavedSae(TopKSae(4, 8, 2), about) for n, about in enumerate(metadata)}
        return corpus_plan(dataclasses.replace(AS_TRAINED, **given), saved=saved)

    fields = {
        "dlm_t_min": lambda found: found.law.t_min,
        "context_size": lambda found: found.context,
        "dlm_pack": lambda found: found.pack,
        "dlm_hide_prompt": lambda found: found.hide_prompt,
    }
    assert fields[name](plan({name: value}, {name: value})) == value
    assert plan({}, {"layer": 3}) == CorpusPlan(MaskLaw(), 2048, False, False)
    with pytest.raises(UsageError, match=f"another {name}: 0 with {value}, .*give {option}"):
        plan({name: value}, {})
    given = {"level": "0.3", "context": 64, "pack": False, "hide_prompt": False}
    wanted = CorpusPlan(MaskLaw(0.3, 0.3), 64, False, False)
    assert plan({name: value}, {}, **given) == wanted
    with pytest.raises(DataError, match=f"'{name}' is 'much'"):
        plan({name: "much"})


def test_a_mix_of_models_is_refused() -> None:
    saved = {name: SavedSae(TopKSae(4, 8, 2), {"model_name": name}) for name in ("a", "b")}
    assert own_model(saved, "c") == "c"
    with pytest.raises(UsageError, match="give --model"):
        own_model(saved, None)
    assert own_model({"a": saved["a"]}, None) == "a"


def test_evaluation_gives_codes_at_its_own_positions() -> None:
    policy = tiny_policy()
    batch = _batches(policy)[0]
    evaluation = Evaluation(
        policy, [_placed(_random(16), 0, kind) for kind in ("mask", "all")], Insertion(insert=False)
    )
    first, second = evaluation.add(batch)
    assert len(first.codes.values) == len(first.row) == int(batch.masked.sum())
    assert len(second.codes.values) == int(batch.selected("all").sum())


def test_commands_write_a_record_for_each(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    model = saved_models("llada")
    for layer, k in itertools.product((0, 1), (2, 4)):
        about = {"dlm_layer": layer, "dlm_positions": "mask", "dlm_t_min": 0.3, "dlm_t_max": 0.9}
        sae = _random(16, layer).float()
        sae.k = k
        write_sae(SavedSae(sae, about), tmp_path / f"saes/layer{layer}-k{k}-mask")
    corpus = tmp_path / "c.jsonl"
    invoke("prompts", "sudoku", "-n", "8", "--completions", "-o", corpus)
    done = invoke("sae-eval", tmp_path / "saes", corpus, "-m", model)
    assert done.exit_code == 0, done.stderr
    rows = [parse_record(line.encode(), "") for line in done.stdout.splitlines()]
    assert [(row["layer"], row["k"]) for row in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert {tuple(row["t"]) for row in rows} == {(0.3, 0.9)}
    sae = tmp_path / "saes/layer1-k4-mask"
    tuned = [sae, corpus, "-m", model, "--tuned", model, "--tuned-saes", sae, "--no-insert"]
    done = invoke("sae-eval", *tuned)
    assert done.exit_code == 0, done.stderr
    row = parse_record(done.stdout.encode(), "")
    assert row["jaccard"] == pytest.approx(1.0)
    assert "matched" in row
    assert invoke("sae-stability", *tuned).stdout == done.stdout
    done = invoke("sae-stability", sae, corpus, "-m", model)
    assert (done.exit_code, "'dlmctl sae-eval --tuned MODEL'" in done.stderr) == (2, True)
    done = invoke("sae-eval", sae, corpus, "-m", model, "--tuned-saes", sae)
    assert (done.exit_code, "--tuned" in done.stderr) == (2, True)
    done = invoke("sae-eval", corpus, "-m", model)
    assert done.exit_code == 2
    assert "is no folder of an autoencoder" in done.stderr


def test_an_autoencoder_is_judged_on_the_corpus_of_its_training(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    """`--pack --context 32` and `--hide-prompt` as `sae-train` writes them down."""
    model, corpus, sae = saved_models("llada"), tmp_path / "c.jsonl", tmp_path / "saes"
    invoke("prompts", "sudoku", "-n", "40", "--completions", "-o", corpus)
    sizes = ["--latents", "16", "-k", "2", "--tokens", "64", "--sae-batch-size", "16"]
    cut = ["--pack", "--context", "32", "--hide-prompt"]
    done = invoke("sae-train", corpus, "-m", model, *sizes, *cut, "-o", sae)
    assert done.exit_code == 0, done.stderr

    def row(*options: str) -> dict[str, Any]:
        done = invoke("sae-eval", sae, corpus, "-m", model, "--no-insert", *options)
        assert done.exit_code == 0, done.stderr
        [line] = done.stdout.splitlines()
        return parse_record(line.encode(), "")

    for more in ([], ["--tuned", model]):
        own, given = row(*more), row(*more, *cut)
        assert own == given
        assert (own["context"], own["pack"], own["hide_prompt"]) == (32, True, True)
        other = row(*more, "--no-pack", "--context", "64", "--keep-prompt")
        assert (other["context"], other["pack"], other["hide_prompt"]) == (64, False, False)
        name = "base_tokens" if more else "tokens"
        assert other[name] != own[name]
    features = [
        invoke("sae-features", sae / "layer0-k2-mask", corpus, "-m", model, "--features", "all", *o)
        for o in ([], cut, ["--no-pack"])
    ]
    assert features[0].stdout == features[1].stdout != features[2].stdout
    tokens = [one.stderr.split(" tokens looked at")[0].split()[-1] for one in features]
    assert tokens[0] == str(row("--seed", "0")["tokens"]) == tokens[1] != tokens[2]


@pytest.mark.parametrize("tuned", [False, True])
def test_a_corpus_without_a_token_of_the_kind_is_an_error(
    tuned: bool, tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    model, corpus = saved_models("llada"), tmp_path / "c.jsonl"
    about = {"dlm_layer": 0, "dlm_positions": "mask", "dlm_t_min": 0.0, "dlm_t_max": 0.0}
    write_sae(SavedSae(_random(16).float(), about), tmp_path / "sae")
    invoke("prompts", "sudoku", "-n", "4", "--completions", "-o", corpus)
    more = ["--tuned", model] if tuned else []
    done = invoke("sae-eval", tmp_path / "sae", corpus, "-m", model, "--no-insert", *more)
    assert done.exit_code == 65
    assert "no token at positions mask" in done.stderr
