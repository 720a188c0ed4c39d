"""Options of the sampler that a model has for itself, and what an explicit option changes."""

import dataclasses
import json

import pytest
from conftest import tiny_policy

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import SamplerConfig, configured
from dlmctl.models.architecture import architecture
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import OWN, Sampler, check_own

DREAM = {
    "architectures": ["DreamModel"], "model_type": "Dream", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mask_token_id": 60,
}  # fmt: skip


def resolved(own, **given):
    """The options that `given` comes to for a model with its own."""
    policy = dataclasses.replace(tiny_policy("llada"), sampling=own)
    return configured(policy, Sampler(**given))


def test_dream_is_sampled_as_its_authors_do():
    own = architecture(DREAM, "config.json").sampling
    config = resolved(own)
    assert config == SamplerConfig(
        128, 128, 128, schedule="timesteps", remasking="entropy", confidence_of="sampled"
    )
    longer = resolved(own, gen_length=300, steps=100, temperature=0.2, top_p=0.95)
    assert (longer.block_length, longer.steps, longer.top_p) == (300, 100, 0.95)
    assert (longer.schedule, longer.remasking) == ("timesteps", "entropy")


def test_config_json_says_more_than_the_family():
    marked = {**DREAM, "dlmctl": {"family": "dream", "sampling": {"gen_length": 8, "top_k": 3}}}
    own = architecture(marked, "config.json").sampling
    assert resolved(own) == SamplerConfig(8, 8, 8, top_k=3)


def test_every_option_that_is_none_can_be_the_models():
    own = {
        "gen_length": 64, "block_length": 16, "steps": 32, "top_p": 0.9, "top_k": 7,
        "cfg_scale": 1.5, "schedule": "timesteps", "remasking": "margin",
        "confidence_of": "sampled", "alg_temp": 0.2, "eos": "late", "early_stop": True,
    }  # fmt: skip
    check_own(own)
    config = resolved(own)
    assert {name: getattr(config, name) for name in own} == own
    assert set(OWN) == {*own, "threshold", "factor", "sub_block_length"}
    other = {
        "gen_length": 40, "block_length": 8, "steps": 20, "top_p": 1.0, "top_k": 0,
        "cfg_scale": 0.0, "schedule": "even", "remasking": "low_confidence",
        "confidence_of": "model", "alg_temp": 0.0, "eos": "normal", "early_stop": False,
    }  # fmt: skip
    config = resolved(own, **other)
    assert {name: getattr(config, name) for name in own} == other


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        # A bound compares a confidence between 0 and 1, and takes as many steps as it needs.
        (
            {"remasking": "entropy", "schedule": "timesteps", "steps": 8},
            {"threshold": 0.9},
            {"remasking": "low_confidence", "steps": None, "schedule": "even"},
        ),
        ({"remasking": "margin", "alg_temp": 0.1}, {"factor": 1.0}, {"remasking": "margin"}),
        (
            {"remasking": "random"},
            {"cache": "dual", "refresh_below": 0.5},
            {"remasking": "low_confidence"},
        ),
        # A model that has a bound for itself.
        ({"threshold": 0.9, "steps": 16}, {}, {"threshold": 0.9, "steps": 16}),
        ({"threshold": 0.9}, {}, {"threshold": 0.9, "steps": None}),
        ({"threshold": 0.9, "steps": 16}, {"threshold": 0.5}, {"threshold": 0.5, "steps": None}),
        ({"threshold": 0.9}, {"factor": 1.0}, {"threshold": None, "factor": 1.0}),
        ({"threshold": 0.9}, {"steps": 16}, {"threshold": 0.9, "steps": 16}),
        ({"factor": 0.9, "sub_block_length": 8}, {"steps": 16}, {"factor": None, "steps": 16}),
        ({"sub_block_length": 8, "steps": 16}, {}, {"sub_block_length": 8, "steps": None}),
        ({"factor": 0.9}, {"schedule": "timesteps"}, {"factor": None, "steps": 128}),
        ({"threshold": 0.9}, {"remasking": "entropy"}, {"threshold": None, "steps": 128}),
        ({"threshold": 0.9}, {"alg_temp": 0.1}, {"threshold": None, "alg_temp": 0.1}),
        ({"threshold": 0.9, "remasking": "entropy"}, {}, {"remasking": "low_confidence"}),
        # Drawing by confidence, and no confidence.
        ({"alg_temp": 0.1}, {"remasking": "random"}, {"alg_temp": 0.0}),
        ({"remasking": "random"}, {"alg_temp": 0.1}, {"remasking": "low_confidence"}),
        ({"remasking": "entropy"}, {"alg_temp": 0.1}, {"remasking": "entropy"}),
        # Lengths.
        ({"block_length": None}, {"gen_length": 7}, {"block_length": 7, "steps": 7}),
        ({"steps": 4}, {"block_length": 2}, {"steps": 64}),
        ({"cfg_scale": 1.0}, {"cache": "dual"}, {"cfg_scale": 0.0}),
    ],
)
def test_what_the_model_has_gives_way_to_what_is_asked(own, given, expected):
    config = resolved(own, **given)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "contradiction",
    [
        {"threshold": 0.9, "schedule": "timesteps"},
        {"factor": 1.0, "alg_temp": 0.1},
        {"remasking": "random", "alg_temp": 0.1},
        {"threshold": 0.9, "remasking": "entropy"},
        {"top_p": 1.5},
        {"top_k": -1},
        {"alg_temp": -0.1},
    ],
)
def test_what_is_asked_must_not_contradict_itself(contradiction):
    with pytest.raises(UsageError, match="--"):
        Sampler(**contradiction)


@pytest.mark.parametrize(
    "sampling",
    [
        {"remasking": "best"}, {"remasking": None}, {"top_p": "0.9"}, {"top_p": float("nan")},
        {"steps": 1.5}, {"early_stop": 1}, {"temperature": 0.5}, {"gen_length": -1},
    ],
)  # fmt: skip
def test_values_of_another_kind_in_config_json_are_refused(sampling):
    with pytest.raises(DataError, match="sampling"):
        architecture({**DREAM, "dlmctl": {"sampling": sampling}}, "config.json")


def test_records_say_how_they_were_sampled():
    policy = tiny_policy("dream")
    record = Record(id="a", tokens={"prompt": [3, 4, 8]})
    config = configured(policy, Sampler(temperature=0.5, top_p=0.9))
    [made] = rollout([record], policy, config, 1, 0, 1)
    assert made["rollout"]["sampler"] == {
        "gen_length": 6, "block_length": 6, "steps": 6, "top_p": 0.9, "schedule": "timesteps",
        "remasking": "entropy", "confidence_of": "sampled", "eos": "normal",
    }  # fmt: skip
    bound = configured(policy, Sampler(threshold=0.9)).used()
    assert json.loads(json.dumps(bound)) == {
        "gen_length": 6, "block_length": 6, "remasking": "low_confidence",
        "confidence_of": "sampled", "threshold": 0.9, "eos": "normal",
    }  # fmt: skip
    assert config.used(diffusion=False) == {"gen_length": 6, "top_p": 0.9}
