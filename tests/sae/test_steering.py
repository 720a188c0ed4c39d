"""Steering against the code written out, and sampling under it against sampling without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.policy import Family, Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.formats.folders import SavedSae, read_sae, write_sae
from dlmctl.sae.steering.steered_policy import STRONGEST, SteeredPolicy
from dlmctl.sae.topk import JumpReluSae, TopKSae
from dlmctl.settings.steering import SteeredFeature, Steering

IDS = torch.tensor([[3, 4, 2, 5, 2, 2, 6, 2], [4, 2, 2, 5, 6, -1, -1, -1]])
STATES = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
SETTINGS = SamplerConfig(12, 4, 12, temperature=0.9)
PROMPTS = ["012", "34", "0", "01234=0", "4321"]
SCOPES = ["all", "update", "topk"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder for the small models, said to be of layer 0."""
    directory = tmp_path_factory.mktemp("saes") / "layer0"
    write_sae(SavedSae(_dictionary(16, 40), {"dlm_layer": 0}), directory)
    return str(directory)


def _dictionary(width: int, latents: int) -> TopKSae:
    generator = torch.Generator().manual_seed(3)
    sae = TopKSae(width, latents, 5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def _steering(
    policy: Policy, *steers: str, settings: SamplerConfig = SETTINGS, **options: Any
) -> SteeredPolicy:
    return SteeredPolicy(policy, settings, Steering(list(steers), **options))


def _written_out(folder: str, states: Tensor, pushes: dict[int, float]) -> Tensor:
    """decode(A') + (H - decode(A)), A' the dense code with amplitude * max A added."""
    sae = read_sae(Path(folder)).sae.double()
    with torch.no_grad():
        flat = states.flatten(0, 1)
        pre = (flat - sae.b_dec) @ sae.W_enc + sae.b_enc
        code = pre.relu() * (pre >= pre.topk(sae.k).values[:, -1:])
        other = code.clone()
        for feature, amplitude in pushes.items():
            other[:, feature] += amplitude * code.amax(dim=1)
        rest = flat - (code @ sae.W_dec + sae.b_dec)
        return (other @ sae.W_dec + sae.b_dec + rest).view_as(states)


def _sampled(
    policy: Policy, settings: SamplerConfig, batch_size: int, *steers: str, **options: Any
):
    records = [Record(id=n, prompt=text) for n, text in enumerate(PROMPTS)]
    made = rollout(records, policy, settings, 2, 7, batch_size)
    if steers:
        made = _steering(policy, *steers, settings=settings, **options).around(made)
    return [record["tokens"]["completion"] for record in made]


def test_one_axpy_is_what_adding_to_the_code_and_keeping_the_error_comes_to(folder: str) -> None:
    steering = _steering(tiny_policy(), f"{folder}:7=2.0", f"{folder}:31=-0.5")
    changed = steering.edits()[0](STATES, IDS)
    expected = _written_out(folder, STATES, {7: 2.0, 31: -0.5})
    there = IDS >= 0
    torch.testing.assert_close(changed[there], expected[there], rtol=0, atol=1e-9)
    assert torch.equal(changed[~there], STATES[~there])
    assert (changed - STATES)[there].norm(dim=1).min() > 0.1


def test_only_latents_above_their_threshold_say_how_strongly_to_push(tmp_path: Path) -> None:
    sae = JumpReluSae(16, 40).requires_grad_(False)
    plain = _dictionary(16, 40).state_dict()
    sae.load_state_dict(
        {**plain, "threshold": torch.full((40,), 12.0).index_fill(0, torch.arange(9), 1.0)}
    )
    write_sae(SavedSae(sae, {"dlm_layer": 0}), tmp_path / "jump")
    changed = _steering(tiny_policy(), f"{tmp_path}/jump:7=2.0").edits()[0](STATES, IDS)
    sae = sae.double()
    pre = (STATES - sae.b_dec) @ sae.W_enc + sae.b_enc
    largest = pre.where(pre > sae.threshold, 0.0).relu().amax(dim=-1)
    assert (largest < pre.amax(dim=-1)).any()
    expected = STATES + (2.0 * largest * (IDS >= 0))[..., None] * sae.W_dec[7]
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_in_the_unit_of_the_norm_the_amplitude_is_the_share_that_is_pushed(
    folder: str, scope: str
) -> None:
    policy = tiny_policy()
    options: dict[str, Any] = {"steer_scope": scope, "steer_unit": "norm"}
    steering = _steering(policy, f"{folder}:7=-0.25", **options)
    push = steering.edits()[0](STATES, IDS) - STATES
    sae = read_sae(Path(folder)).sae.double()
    expected = -0.25 * STATES.norm(dim=2, keepdim=True) * sae.W_dec[7] / sae.W_dec[7].norm()
    steered = push.any(dim=2)
    torch.testing.assert_close(push[steered], expected[steered])
    other = _steering(policy, f"{folder}:7=-0.25", steer_scope=scope).edits()[0](STATES, IDS)
    assert torch.equal(steered, (other != STATES).any(dim=2))


@pytest.mark.parametrize("scope", SCOPES)
def test_what_was_pushed_is_noted_for_each_completion(folder: str, scope: str) -> None:
    steering = _steering(tiny_policy(), f"{folder}:7=2.0", f"{folder}@1:3=1", steer_scope=scope)
    means: list[list[float]] = [[], []]
    for states in (STATES, STATES.flip(1)):
        steering.on_rows([0, 1])
        for edit in steering.edits().values():
            share = (edit(states, IDS) - states).norm(dim=2) / states.norm(dim=2)
            edit(states, IDS)  # as the second pass of guidance, which does not count
            for row in (0, 1):
                means[row] += share[row][share[row] > 0].tolist()
    records = list(steering.around([Record(error={}), Record(rollout={}), Record(rollout={})]))
    noted = [record["rollout"]["push"] for record in records[1:]]
    assert noted == pytest.approx([sum(part) / len(part) for part in means])


@pytest.mark.parametrize("family", ["llada", "dream", "ar"])
@pytest.mark.parametrize("scope", ["all", "update"])
def test_what_is_noted_does_not_depend_on_neighbours_or_the_cache(
    folder: str, family: Family, scope: str
) -> None:
    policy = dataclasses.replace(tiny_policy(family), pad_id=1)
    noted = []
    ways: list[dict[str, Any]] = [{"refresh": 1, "cache": "prefix"}] if policy.diffusion else []
    for batch_size, way in ((1, {}), (4, {}), *((3, way) for way in ways)):
        settings = SamplerConfig(10, 4, 12, temperature=0.9, early_stop=True, **way)
        steering = _steering(policy, f"{folder}:7=1.5", settings=settings, steer_scope=scope)
        records = [Record(id=n, prompt=text) for n, text in enumerate(PROMPTS)]
        made = rollout(records, policy, settings, 2, 7, batch_size, callback=steering)
        noted.append([record["rollout"]["push"] for record in steering.around(made)])
        assert not steering._pushes
    assert len(set(noted[0])) > 1
    for other in noted[1:]:
        assert other == pytest.approx(noted[0])


@pytest.mark.parametrize("family", ["llada", "dream", "mlm"])
def test_the_first_pass_steers_the_whole_completion_and_nothing_else_by_update(
    folder: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, first = tiny_policy(family), []
    places = SteeredPolicy.places

    def watched(self: SteeredPolicy, ids: Tensor) -> Tensor:
        first.append(places(self, ids))
        return places(self, ids)

    monkeypatch.setattr(SteeredPolicy, "places", watched)
    _sampled(policy, SETTINGS, 16, f"{folder}:7=1.5", steer_scope="update")
    lengths = sorted(len(policy.encode(Record(prompt=text))) for text in PROMPTS for _ in "12")
    starts = sorted(row.nonzero()[0].item() for row in first[0])
    assert starts == lengths
    assert first[0].sum(dim=1).tolist() == [12] * 10
    assert first[0].shape[0] == 10


def test_autoencoders_at_one_layer_see_the_same_activations(folder: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    write_sae(SavedSae(_dictionary(16, 60)), Path(other))
    steering = _steering(tiny_policy(), f"{folder}:7=2.0", f"{other}@0:50=1.0")
    changed = steering.edits()[0](STATES, IDS.clamp(min=0))
    parts = [_written_out(folder, STATES, {7: 2.0}), _written_out(other, STATES, {50: 1.0})]
    torch.testing.assert_close(changed, parts[0] + parts[1] - STATES)


def test_features_of_an_autoencoder_share_one_code(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = TopKSae.pre_activations
    monkeypatch.setattr(
        TopKSae, "pre_activations", lambda sae, x: calls.append(len(x)) or encode(sae, x)
    )
    steers = [f"{folder}@{layer}:{feature}=1.0" for layer in (0, 1) for feature in (1, 2, 3)]
    policy = tiny_policy()
    steering = _steering(policy, *steers)
    for edit in steering.edits().values():
        edit(STATES, IDS)
    assert calls == [int((IDS >= 0).sum())] * 2


def test_only_what_is_masked_is_steered(folder: str) -> None:
    steering = _steering(tiny_policy(), f"{folder}:7=2.0", steer_scope="update")
    changed = (steering.edits()[0](STATES, IDS) != STATES).any(dim=2)
    assert torch.equal(changed, IDS == 2)


def test_the_strongest_positions_of_each_row_are_steered(folder: str) -> None:
    sae = read_sae(Path(folder)).sae.double()
    for feature in range(8):
        steering = _steering(tiny_policy(), f"{folder}:{feature}=2.0", steer_scope="topk")
        changed = (steering.edits()[0](STATES, IDS) != STATES).any(dim=2)
        for row, length in ((0, 8), (1, 5)):
            pre = (STATES[row, :length] - sae.b_dec) @ sae.W_enc[:, feature]
            expected = pre.argsort(descending=True)[:STRONGEST]
            assert sorted(expected.tolist()) == changed[row].nonzero()[:, 0].tolist()
    short = steering.edits()[0](STATES[:, :2], IDS[:, :2])
    assert (short != STATES[:, :2]).any(dim=2).all()


def test_the_newest_position_of_an_autoregressive_model(folder: str) -> None:
    steering = _steering(tiny_policy("ar"), f"{folder}:7=2.0", steer_scope="update")
    assert torch.equal(steering.places(IDS[:1]).nonzero(), torch.tensor([[0, 7]]))


def test_adjoining_times_have_every_step_once(folder: str) -> None:
    ids = torch.full((12, 14), 5)
    for masked in range(1, 13):
        ids[masked - 1, 2 : 2 + masked] = 2
    counts = torch.zeros(12, dtype=torch.int64)
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 1)):
        places = _steering(tiny_policy(), f"{folder}@0:7=1.0", steer_time=f"{low}-{high}").places(
            ids
        )
        inside = places.all(dim=1)
        assert torch.equal(inside, places.any(dim=1))
        shares = [masked / 12 for masked in range(1, 13)]
        assert inside.tolist() == [low < share <= high for share in shares]
        counts += inside
    assert (counts == 1).all()


@pytest.mark.parametrize("family", ["llada", "dream", "mlm", "ar"])
def test_amplitude_zero_changes_no_token_and_a_large_one_does(folder: str, family: Family) -> None:
    policy = tiny_policy(family)
    plain = _sampled(policy, SETTINGS, 4)
    for scope in SCOPES:
        assert _sampled(policy, SETTINGS, 4, f"{folder}@1:7=0.0", steer_scope=scope) == plain
        assert _sampled(policy, SETTINGS, 4, f"{folder}@1:7=9.0", steer_scope=scope) != plain
    assert _sampled(policy, SETTINGS, 4) == plain  # nothing stays behind


def test_amplitude_zero_leaves_the_bits_of_a_bfloat16_model(folder: str) -> None:
    policy = tiny_policy()
    policy.model.bfloat16()
    states = STATES.bfloat16()
    none, some = (
        _steering(policy, f"{folder}:7={amplitude}").edits()[0](states, IDS)
        for amplitude in (0.0, 2.0)
    )
    assert torch.equal(none, states)
    assert some.dtype == torch.bfloat16
    expected = _written_out(folder, states.double(), {7: 2.0})[IDS >= 0]
    torch.testing.assert_close(some[IDS >= 0].double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_cache_that_is_renewed_in_each_step_is_steered_as_none(
    folder: str, family: Family, scope: str
) -> None:
    policy, steer = tiny_policy(family), f"{folder}:7=1.5"
    exact = _sampled(policy, SETTINGS, 4, steer, steer_scope=scope)
    for cache in ("prefix", "dual"):
        settings = dataclasses.replace(SETTINGS, cache=cache, refresh=1)
        assert _sampled(policy, settings, 4, steer, steer_scope=scope) == exact


@pytest.mark.parametrize("family", ["llada", "dream", "ar"])
@pytest.mark.parametrize("scope", SCOPES)
def test_steered_completions_do_not_depend_on_their_neighbours(
    folder: str, family: Family, scope: str
) -> None:
    # As in LLaDA padding is the same token as end-of-sequence, which completions hold too.
    policy = dataclasses.replace(tiny_policy(family), pad_id=1)
    steer = f"{folder}:7=1.5"
    ways: list[dict[str, Any]] = [{}]
    if policy.diffusion:
        ways += [{"cache": "prefix"}, {"cache": "dual"}]
    for way in ways:
        settings = SamplerConfig(10, 4, 12, temperature=0.9, early_stop=True, **way)
        alone = _sampled(policy, settings, 1, steer, steer_scope=scope)
        assert _sampled(policy, settings, 4, steer, steer_scope=scope) == alone
        assert not policy.diffusion or any(1 in tokens[:-1] for tokens in alone)


def test_time_counts_the_masked_tokens_of_the_row_with_a_prefix_cache_too(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, steer = tiny_policy("dream"), f"{folder}:7=1.5"
    always = _sampled(policy, SETTINGS, 4, steer)
    assert _sampled(policy, SETTINGS, 4, steer, steer_time="0.0-1.0") == always
    assert _sampled(policy, SETTINGS, 4, steer, steer_time="0.5-1.0") not in (
        always,
        _sampled(policy, SETTINGS, 4),
    )
    seen: list[float] = []
    places = SteeredPolicy.places

    def watched(self: SteeredPolicy, ids: Tensor) -> Tensor:
        seen.extend((ids == 2).sum(dim=1).tolist())
        return places(self, ids)

    monkeypatch.setattr(SteeredPolicy, "places", watched)
    counts = []
    for cache in ("none", "prefix"):
        for batch_size in (1, 2):
            seen.clear()
            # With a threshold rows get to stand in different blocks, which a pass pads.
            settings = SamplerConfig(10, 4, None, 0.9, threshold=0.4, cache=cache)
            _sampled(policy, settings, batch_size, f"{folder}@0:7=0.0", steer_time="0.0-0.5")
            counts.append(sorted(seen))
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]
    assert max(counts[0]) == max(counts[2]) == 10


@pytest.mark.parametrize(
    ("family", "settings", "options", "message"),
    [
        ("llada", {"compile": True}, {}, "--compile and --steer"),
        ("llada", {"cache": "dual"}, {"steer_time": "0-0.5"}, "use --cache prefix"),
        ("llada", {"cfg_scale": 1.0}, {"steer_scope": "update"}, "--cfg-scale hides the prompt"),
        ("llada", {"cfg_scale": 1.0}, {"steer_time": "0-0.5"}, "--cfg-scale hides the prompt"),
        ("ar", {}, {"steer_time": "0-0.5"}, "--steer-time means nothing to"),
    ],
)
def test_what_does_not_go_with_steering_is_refused(
    folder: str, family: Family, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _steering(
            tiny_policy(family), f"{folder}:7=1.0", settings=SamplerConfig(**settings), **options
        )


def test_an_autoencoder_that_does_not_fit_is_refused(folder: str, tmp_path: Path) -> None:
    write_sae(SavedSae(_dictionary(8, 20)), tmp_path / "narrow")
    narrow = str(tmp_path / "narrow")
    for steers, message in [
        ([f"{narrow}:3=1.0"], r"which layer it is of .*--steer .*narrow@LAYER:3=1"),
        ([f"{narrow}@0:3=1.0"], "width 8, the model's have 16"),
        ([f"{folder}:40=1.0"], "latents 0 to 39, and no 40"),
        ([f"{folder}@2:3=1.0"], "no layer 2"),
        ([f"{folder}:3=1.0", f"{folder}@0:3=2.0"], "names a feature twice"),
    ]:
        with pytest.raises(UsageError, match=message):
            _steering(tiny_policy(), *steers)


def test_options_are_read() -> None:
    [first, second] = Steering(["a/b:3=-2.5", "a@b/c=d:e@26:3=2"], steer_time="0.5-1").features
    assert first == SteeredFeature("a/b", None, 3, -2.5)
    assert second == SteeredFeature("a@b/c=d:e", 26, 3, 2.0)
    assert Steering(["a:3=1"], steer_time="0.5-1").time == (0.5, 1.0)
    for text in ("a", "a:3", "a:3=x", "a:x=3", ":3=1", "a:-3=1"):
        with pytest.raises(UsageError, match="is not SAE"):
            Steering([text])
    for text in ("0.5", "1-0", "0.5-0.5", "0-2", "a-b"):
        with pytest.raises(UsageError, match="--steer-time"):
            Steering(["a:3=1"], steer_time=text)


def test_the_command_notes_what_was_done_and_zero_is_the_unsteered_twin(
    folder: str, tmp_path: Path, saved_models: Any
) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "12="}\n{"id": "b"}\n')

    def run(*options: str) -> Any:
        line = ["rollout", "-m", saved_models("llada"), "-n", "2", "--gen-length", "8"]
        return CliRunner().invoke(
            app, [*line, "--on-error", "keep", *options, str(tmp_path / "p.jsonl")]
        )

    def records(*options: str) -> list[dict[str, Any]]:
        done = run(*options)
        assert done.exit_code == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    time = ["--steer-scope", "update", "--steer-time", "0.25-1"]
    plain, zero = records(), records("--steer", f"{folder}:7=0", *time)
    notes = {"sae": folder, "layer": 0, "feature": 7, "amplitude": 0.0, "unit": "activation"}
    for twin in zero[:2]:
        assert twin["rollout"].pop("steer") == [{**notes, "scope": "update", "time": [0.25, 1.0]}]
        assert twin["rollout"].pop("push") == 0
    assert zero == plain
    far = records("--steer", f"{folder}@1:7=30", "--steer", f"{folder}:7=30")
    assert [s["layer"] for s in far[0]["rollout"]["steer"]] == [1, 0]
    assert far[0]["tokens"] != plain[0]["tokens"]
    equal = records("--steer", f"{folder}:7=-0.5", "--steer-unit", "norm")
    assert [record["rollout"]["push"] for record in equal[:2]] == pytest.approx([0.5, 0.5])
    assert equal[0]["rollout"]["steer"][0]["unit"] == "norm"
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "12="}\n')
    guided = records("--steer", f"{folder}:7=2", "--remasking", "sae", "--sae", f"{folder}@1")
    assert guided[0]["rollout"]["remasking"] == "sae"
    assert guided[0]["rollout"]["push"] > 0
    for options, message in [
        (["--steer-time", "0-1"], "give --steer too"),
        (["--steer", f"{folder}:7=1", "--follow", "run"], "--steer and --follow"),
        (["--steer", f"{folder}:7=1", "--compile"], "--compile and --steer"),
    ]:
        refused = run(*options)
        assert refused.exit_code == 2
        assert message in refused.stderr
