"""Features followed while sampling, against every canvas passed over again on its own."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import pytest
import torch
from conftest import nearly, tiny_policy
from small_world import random_sae
from torch import Tensor

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.attention import plain_rows
from dlmctl.models.blocks import block_outputs
from dlmctl.models.policy import Family, Policy
from dlmctl.records.jsonl import Record
from dlmctl.report.auroc import stratified_auroc
from dlmctl.sae.order.study import OrderStudy
from dlmctl.sae.order.tracking import FeatureTracker
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer
from dlmctl.sae.topk import JumpReluSae

PROMPTS = ["012", "34", "0", "01234=0", "4321"]
SETTINGS = SamplerConfig(9, 5, 8, temperature=0.9)


def _saes(*layers: int) -> list[SaeAtLayer]:
    """Random saes in float64, no two of a layer alike."""
    made = [
        SaeAtLayer(f"d{number}", layer, random_sae(latents=40 + number, k=3 + number).double())
        for number, layer in enumerate(layers)
    ]
    for one in made:
        one.sae.requires_grad_(False)
    return made


def _with_thresholds(at: SaeAtLayer, threshold: float) -> SaeAtLayer:
    sae = JumpReluSae(at.sae.d_in, at.sae.d_sae).double().requires_grad_(False)
    sae.load_state_dict(
        {**at.sae.state_dict(), "threshold": torch.full((at.sae.d_sae,), threshold)}
    )
    return at._replace(name="jump", sae=sae)


def _records(**more: Any) -> list[Record]:
    return [Record(id=n, prompt=text, **more) for n, text in enumerate(PROMPTS)]


class _Step:
    """One canvas of a completion, passed over on its own."""

    def __init__(self, policy: Policy, tokens: dict[str, list[int]], known: list[bool]) -> None:
        self.masked = [not there for there in known]
        completion = [
            token if there else policy.mask_id
            for token, there in zip(tokens["completion"], known, strict=True)
        ]
        self.ids = torch.tensor([[*tokens["prompt"], *completion]])
        self.start, self.length = len(tokens["prompt"]), len(completion)
        self.policy = policy

    @torch.no_grad()
    def codes(self, at: SaeAtLayer) -> tuple[Tensor, Tensor]:
        """Activations [G, d] and dense codes [G, F], written out."""
        layer, sae = at.layer, at.sae
        x = block_outputs(self.policy, plain_rows(self.ids, None), [layer])[layer][0, self.start :]
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        if isinstance(sae, JumpReluSae):
            return x, pre.where(pre > sae.threshold, 0.0)
        return x, pre.relu() * (pre >= pre.topk(sae.k).values[:, -1:])

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """[G, V], with the mask token's."""
        positions = self.start + torch.arange(self.length)
        rows = torch.zeros(self.length, dtype=torch.int64)
        return self.policy.predict(self.ids, None, rows, positions).softmax(-1)


def _replayed(policy: Policy, record: Record) -> list[_Step]:
    """The canvases that a completion went through, told by the order of its tokens."""
    order = record["rollout"]["order"]
    return [
        _Step(policy, record["tokens"], [decided < step for decided in order])
        for step in sorted(set(order))
    ]


def _sets(code: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in code]


def _similar(now: set[int], before: set[int]) -> float:
    return len(now & before) / len(now | before) if now | before else 1.0


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _written_out(steps: list[_Step], sae: SaeAtLayer) -> dict[str, Any]:
    """The numbers of a report from the canvases, by loops."""
    codes = [step.codes(sae)[1] for step in steps]
    sets, tops = [_sets(code) for code in codes], [code.argmax(dim=1).tolist() for code in codes]
    found: dict[str, list[float]] = {name: [] for name in ("s_pre", "s_pre_last5", "lock_ratio")}
    found |= {name: [] for name in ("jump", "d_post", "flips_post")}
    for place in range(steps[0].length):
        pre, lock, post, flips = [], [], [], []
        for t in range(1, len(steps)):
            similarity = _similar(sets[t][place], sets[t - 1][place])
            same = tops[t][place] == tops[t - 1][place]
            if steps[t].masked[place]:
                pre.append(similarity)
                lock.append(same)
            elif steps[t - 1].masked[place]:
                found["jump"].append(1 - similarity)
            else:
                post.append(1 - similarity)
                flips.append(not same)
        if pre:
            found["s_pre"].append(sum(pre) / len(pre))
            found["s_pre_last5"].append(sum(pre[-5:]) / len(pre[-5:]))
            found["lock_ratio"].append(sum(lock) / len(lock))
        if post:
            found["d_post"].append(sum(post) / len(post))
            found["flips_post"].append(sum(flips))
    return {name: _mean(values) for name, values in found.items()}


def test_the_room_for_active_features_grows_and_does_not_shrink() -> None:
    tracker = FeatureTracker(tiny_policy(), [_with_thresholds(*_saes(0), 2.0)])
    tracker.canvas = Namespace(
        device="cpu", owner=[0, 1], settings=Namespace(gen_length=3), starts=[0, 0], nfe=[0, 0],
        tensor=torch.tensor,
    )  # fmt: skip
    FeatureTracker.on_start(tracker, tracker.canvas)
    sae, ids = tracker.saes[0].sae, torch.zeros(2, 3, dtype=torch.int64)
    sets: list[list[set[int]]] = []
    generator = torch.Generator().manual_seed(0)
    for scale in (0.5, 3.0, 1.0):
        output = scale * torch.randn(2, 3, 16, dtype=torch.float64, generator=generator)
        found = tracker._features(0, [0, 1], output, ids)
        tracker.canvas.nfe = [1, 1]
        sets.append(_sets(sae.encode(output.flatten(0, 1)).dense(sae.d_sae)))
        assert [set(row) - {-1} for row in found.active.flatten(0, 1).tolist()] == sets[-1]
        before = sets[-2] if len(sets) > 1 else sets[-1]
        similar = [_similar(a, b) for a, b in zip(sets[-1], before, strict=True)]
        assert found.change.similarity.flatten().tolist() == pytest.approx(similar)
    most = [max(map(len, step)) for step in sets]
    assert most[0] < most[2] < most[1]


@pytest.mark.parametrize("family", ["llada", "dream", "mlm"])
@pytest.mark.parametrize("way", [{}, {"cfg_scale": 1.0}, {"remasking": "random"}])
def test_what_is_recorded_is_what_a_replay_sees(family: Family, way: dict[str, Any]) -> None:
    policy, saes = tiny_policy(family), _saes(0, 1, 1)
    saes.append(_with_thresholds(saes[0], 2.0))
    settings = SamplerConfig(9, 5, 8, temperature=0.9, **way)
    order = settings.remasking
    study = OrderStudy(policy, saes, settings, [order])
    [record] = study.run(_records()[:1], 1, 0, 4)
    steps = _replayed(policy, record)
    assert len(steps) == 8
    for sae, report in zip(saes, record["features"], strict=True):
        assert (report["sae"], report["layer"]) == sae[:2]
        expected = _written_out(steps, sae)
        assert {name: report[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    [plain] = rollout(_records()[:1], policy, study.samplers[order], 1, 0, 4)
    assert plain["tokens"] == record["tokens"]


def test_features_are_counted_over_the_steps_of_all_completions() -> None:
    policy, saes = tiny_policy(), _saes(1)
    study = OrderStudy(policy, saes, SETTINGS, ["low_confidence", "random"])
    records = list(study.run(_records(), 2, 0, 3))
    means = []
    for order in ("low_confidence", "random"):
        counts, seen = torch.zeros(20, 40, dtype=torch.float64), torch.zeros(20, 1)
        for record in records:
            if record["rollout"]["remasking"] == order:
                for step in _replayed(policy, record):
                    part = 20 * (9 - sum(step.masked)) // 9
                    counts[part] += (step.codes(saes[0])[1] > 0).sum(dim=0)
                    seen[part] += 1
        means.append(counts / seen)
    both = ~(means[0] + means[1]).isnan().any(dim=1)
    expected = (means[0] - means[1])[both].abs().sum(dim=0)
    rows = [row for row in study.summary() if row["row"] == "feature"]
    assert len(rows) == 20
    assert {(row["order"], row["reference"]) for row in rows} == {("random", "low_confidence")}
    assert [row["score"] for row in rows] == pytest.approx(
        expected.sort().values.flip(0)[:20].tolist()
    )
    for row in rows:
        assert row["score"] == pytest.approx(float(expected[row["feature"]]))


def _signals(policy: Policy, sae: SaeAtLayer, record: Record, truth: list[int | None]):
    """(step, right, signals) of each proposal within the block under way, by loops."""
    order, steps = record["rollout"]["order"], _replayed(policy, record)
    for t in range(1, len(steps)):
        first = steps[t].masked.index(True) // 5 * 5
        p = steps[t].probabilities()
        (x, code), before = steps[t].codes(sae), steps[t - 1].codes(sae)[1]
        likely = p.clone()
        likely[:, policy.mask_id] = -1
        error = x - (code @ sae.sae.W_dec + sae.sae.b_dec)
        for place in range(first, min(first + 5, len(truth))):
            if not steps[t].masked[place] or truth[place] is None:
                continue
            now, old = (_sets(part[place : place + 1])[0] for part in (code, before))
            token = int(likely[place].argmax())
            yield (
                sorted(set(order))[t],
                token == truth[place],
                {
                    "confidence": float(p[place, token]),
                    "stability": _similar(now, old),
                    "shared": len(now & old),
                    "top_activation": float(code[place].max()),
                    "activation_norm": float(x[place].norm()),
                    "reconstruction_error": float(error[place].norm() / x[place].norm()),
                    "progress": steps[t].masked.count(False) / 9,
                },
            )


@pytest.mark.parametrize("order", ["random", "entropy"])
def test_signals_are_those_of_the_replay(order: Any) -> None:
    policy, [sae] = tiny_policy(), _saes(1)
    truth: list[int | None] = list(policy.encode_text("0123412"))
    truth[2] = truth[4] = None
    study = OrderStudy(policy, [sae], SETTINGS, [order], "answer")
    records = list(study.run([*_records(answer=truth)[:3], Record(id="none", prompt="1")], 2, 0, 3))
    assert [record["id"] for record in records] == [0, 0, 1, 1, 2, 2, "none", "none"]
    assert "truth" not in records[0]["tokens"]
    found = [entry for r in records[:6] for entry in _signals(policy, sae, r, truth)]
    pool = study.recorders[order].pools[0].columns()
    assert pool["right"].sum() not in (0, len(found))
    for name in found[0][2]:
        expected = sorted((step, right, signals[name]) for step, right, signals in found)
        columns = (pool["step"].tolist(), pool["right"].tolist(), pool[name].tolist())
        for ours, theirs in zip(sorted(zip(*columns, strict=True)), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)
    rows = {row["signal"]: row for row in study.summary() if row["row"] == "signal"}
    right = torch.tensor([entry[1] for entry in found])
    step = torch.tensor([entry[0] for entry in found])
    values = torch.tensor([entry[2]["confidence"] for entry in found])
    assert rows["confidence"]["auroc"] == pytest.approx(stratified_auroc(values, right))
    assert rows["confidence"]["auroc_step"] == pytest.approx(stratified_auroc(values, right, step))
    assert rows["progress"]["auroc_choice"] == 0.5
    assert rows["confidence"]["proposals"] == rows["confidence"]["used"] == len(found)


def _probed(policy: Policy, sae: SaeAtLayer, record: Record, truth: list[int]):
    """(right, numbers, activations) of each proposal within the block under way, by loops."""
    for step in _replayed(policy, record):
        first, (x, _) = step.masked.index(True) // 5 * 5, step.codes(sae)
        for place, p in enumerate(step.probabilities()):
            if step.masked[place] and first <= place < first + 5:
                likely = p.clone()
                likely[policy.mask_id] = -1
                token, best = int(likely.argmax()), p.sort(descending=True).values
                entropy = float((p * p.log()).sum())
                numbers = [float(p[token]), float(best[0] - best[1]), entropy]
                yield token == truth[place], numbers, x[place].tolist()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_probes_read_is_what_a_replay_sees(family: Family) -> None:
    policy, [sae] = tiny_policy(family), _saes(1)
    truth = policy.encode_text("012341204")
    study = OrderStudy(policy, [sae], SETTINGS, ["random"], "answer", probes=10_000)
    records = list(study.run(_records(answer=truth), 2, 0, 3))
    found = sorted(entry for record in records for entry in _probed(policy, sae, record, truth))
    [pool] = study.recorders["random"].probed or []
    columns = pool.columns()
    parts = (columns[name].tolist() for name in ("right", "numbers", "x"))
    for ours, theirs in zip(sorted(zip(*parts, strict=True)), found, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-9)
        assert ours[2] == pytest.approx(theirs[2], abs=1e-9)
    assert len(columns["puzzle"].unique()) == 5
    assert len(columns["unit"].unique()) == 5 * 2 * 8
    rows = [row for row in study.summary() if row["row"] == "probe"]
    assert [row["reason"] for row in rows] == [
        "a half has 3 puzzles, and a probe takes at least 10"
    ]


def test_solving_is_asked_of_the_tokens_that_are_known() -> None:
    policy, [sae] = tiny_policy(), _saes(1)
    truths = {}
    for record in OrderStudy(policy, [sae], SETTINGS, ["random"]).run(_records(), 1, 0, 4):
        truths[record["id"]] = record["tokens"]["completion"]
    truths[1] = [None, *truths[1][1:]]
    truths[2] = [3 + (truths[2][0] == 3), *truths[2][1:]]
    records = [Record(r, answer=truths[r["id"]]) for r in _records()]
    study = OrderStudy(policy, [sae], SETTINGS, ["random"], "answer")
    made = list(study.run(records, 1, 0, 4))
    rows = {row["measure"]: row for row in study.summary() if row["row"] == "solving"}
    assert (rows["s_pre"]["completions"], rows["s_pre"]["solved"]) == (5, 0.8)
    values = torch.tensor([[r["features"][0]["s_pre"], r["id"] != 2] for r in made]).double()
    assert rows["s_pre"]["correlation"] == pytest.approx(float(values.T.corrcoef()[0, 1]))


def test_turnover_is_one_minus_the_curves_of_the_means() -> None:
    study = OrderStudy(tiny_policy(), _saes(1), SETTINGS, ["random", "entropy"])
    for _ in study.run(_records(), 1, 0, 4):
        pass
    rows = list(study.summary())
    for mean in (row for row in rows if row["row"] == "mean"):
        curve = [r for r in rows if r["row"] == "turnover" and r["order"] == mean["order"]]
        assert [row["progress"] for row in curve] == pytest.approx(
            [n / 10 + 0.05 for n in range(10)]
        )
        for kind in ("masked", "decided"):
            kept = [None if row[kind] is None else 1 - row[kind] for row in curve]
            assert kept == nearly(mean[f"{kind}_by_progress"], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_records_and_summary_do_not_depend_on_the_batch(family: Family) -> None:
    policy, saes = tiny_policy(family), _saes(0, 1)
    made = []
    for batch_size in (1, 3):
        settings = SamplerConfig(10, 4, None, 0.9, threshold=0.4, early_stop=True)
        study = OrderStudy(policy, saes, settings, ["random", "sae"], "answer")
        records = sorted(
            study.run(_records(answer="01234012"), 1, 3, batch_size),
            key=lambda record: (record["rollout"]["remasking"], record["id"], record["sample"]),
        )
        made.append([json.loads(json.dumps(x)) for x in (records, list(study.summary()))])
    assert made[0] == nearly(made[1], rel=1e-9, abs=1e-12)


def _guided(policy: Policy, settings: SamplerConfig, tracker: FeatureTracker, batch_size: int = 4):
    made = rollout(_records(), policy, settings, 2, 7, batch_size, callback=tracker)
    return [(r["tokens"]["completion"], r["rollout"]["order"]) for r in tracker.around(made)]


def test_a_signal_that_is_constant_leaves_the_order_of_low_confidence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, saes = tiny_policy(), _saes(0, 1)
    for way in ({"eos": "late"}, {"temperature": 0.0}):
        plain, guided = (
            SamplerConfig(
                **{"gen_length": 9, "block_length": 5, "steps": 8, "temperature": 0.9} | way,
                remasking=remasking,
            )
            for remasking in ("low_confidence", "sae")
        )
        tracker = FeatureTracker(policy, saes)
        usual = _guided(policy, plain, tracker)
        free = [
            (r["tokens"]["completion"], r["rollout"]["order"])
            for r in rollout(_records(), policy, plain, 2, 7, 4)
        ]
        assert usual == free
        assert _guided(policy, guided, tracker) != usual
        with monkeypatch.context() as patch:
            patch.setattr(
                FeatureTracker, "stability", lambda self, masked: torch.ones(len(masked.row))
            )
            assert _guided(policy, guided, tracker) == usual


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_order_that_goes_by_features_written_out(family: Family) -> None:
    policy, saes = tiny_policy(family), _saes(0, 1)
    settings = SamplerConfig(8, 8, 8, remasking="sae")
    tracker = FeatureTracker(policy, saes)
    [made] = tracker.around(rollout(_records()[:1], policy, settings, 1, 0, 1, callback=tracker))
    tokens = {"prompt": made["tokens"]["prompt"], "completion": [policy.mask_id] * 8}
    order, before = [-1] * 8, None
    for number in range(8):
        step = _Step(policy, tokens, [decided >= 0 for decided in order])
        p = step.probabilities()
        p[:, policy.mask_id] = -1
        sets = [_sets(step.codes(sae)[1]) for sae in saes]
        sure = p.amax(dim=1)
        if before is not None:
            for place in range(8):
                pairs = [(n[place], b[place]) for n, b in zip(sets, before, strict=True)]
                sure[place] *= sum(_similar(*pair) for pair in pairs) / 2
        sure[[decided >= 0 for decided in order]] = -1
        place, before = int(sure.argmax()), sets
        tokens["completion"][place], order[place] = int(p[place].argmax()), number
    assert (made["tokens"], made["rollout"]["order"]) == (tokens, order)
    assert made["rollout"]["remasking"] == "sae"
    assert made["rollout"]["sae"] == [{"sae": "d0", "layer": 0}, {"sae": "d1", "layer": 1}]


def test_completions_by_features_do_not_depend_on_their_neighbours() -> None:
    policy = tiny_policy()
    tracker = FeatureTracker(policy, _saes(1))
    settings = SamplerConfig(10, 4, None, 0.9, threshold=0.4, remasking="sae")
    alone = _guided(policy, settings, tracker, 1)
    assert _guided(policy, settings, tracker, 4) == alone
    assert _guided(policy, settings, tracker, 64) == alone
