"""The table of algorithms: what it says of each, and that the help says the same."""

import inspect
import re
from dataclasses import fields
from typing import get_args

import pytest

from dlmctl.cli import functions
from dlmctl.records.errors import UsageError
from dlmctl.rl.objectives.table import make_objective, objective_class
from dlmctl.settings.algorithms import RECIPES, Algorithm, Reinforcement, check_kind
from dlmctl.settings.mask_laws import ALL
from dlmctl.settings.objective import Constants

WORDS = {
    "until-eos": True,
    "all-tokens": False,
    "drop-zero-adv": True,
    "keep-zero-adv": False,
    "all": ALL,
}
RECIPE = ("inner", "baseline", "scale", "until_eos", "prompt_mask", "shrink", "drop_zero_adv")
FIELDS = {
    "masks": "law",
    "law": "law",
    "samples": "samples",
    "masks_per_sample": "samples",
    **{name: name for name in RECIPE},
    **{field.name: field.name for field in fields(Constants)},
}
"""What of the table the options of the commands are, by their names."""


def shown(command, name):
    """The default of an option as its help shows it; None if the command has no such option."""
    parameter = inspect.signature(functions(command)[command], eval_str=True).parameters.get(name)
    found = getattr(parameter and parameter.annotation, "__metadata__", ())
    return found[0].show_default if found else None


def values(text):
    """`a and b 1, others 2` as the values of the algorithms."""
    found, names = {}, []
    for word in re.split(r",? |,", text.replace(" and ", " ")):
        if word in get_args(Algorithm) or word == "others":
            names.append(word)
        elif word:
            found |= dict.fromkeys(names, word)
            names = []
    rest = found.pop("others", None)
    return found if rest is None else {algo: found.get(algo, rest) for algo in RECIPES}


def number(text):
    if text in WORDS:
        return WORDS[text]
    return float(text) if re.fullmatch(r"[0-9.e-]+", text) else text


@pytest.mark.parametrize("command", ["update", "plan", "advantage"])
def test_help_shows_the_default_of_every_algorithm(command):
    seen = 0
    for name, field in FIELDS.items():
        text = shown(command, name)
        if not isinstance(text, str) or field in ("clip_high", "dual_clip", "max_length"):
            continue
        table = {
            algo: getattr(recipe, field, recipe.constants.get(field))
            for algo, recipe in RECIPES.items()
            if hasattr(recipe, field) or field in recipe.constants
        }
        assert {algo: number(value) for algo, value in values(text).items()} == table, name
        seen += 1
    assert seen == {"update": 18, "plan": 5, "advantage": 2}[command]


def test_every_algorithm_has_a_recipe_and_an_objective_with_its_constants():
    assert [*RECIPES] == [*get_args(Algorithm)]
    for algo in get_args(Reinforcement):
        recipe, kind = RECIPES[algo], objective_class(algo)
        assert {field.name for field in fields(kind)} == {*recipe.constants, *recipe.fixed}
        assert not {*recipe.constants} & {*recipe.fixed}
        assert {*recipe.constants} <= {field.name for field in fields(Constants)}


@pytest.mark.parametrize(
    ("algo", "told"),
    [
        # LLaDA-8B on GSM8K: diffu-grpo/slurm_scripts/{train.yaml,gsm_base.sbatch} of d1;
        # wd1/train.yaml and run/wll_NP_gsm8k.sh of wd1; spg/slurm_scripts/train.yaml and
        # spg_mix/gsm_base_* of SPG; recipes/{train.yaml,run_gsm8k_llada.sh} of ESPO;
        # scripts/{train_gdsd.yaml,run_gdsd_llada_gsm8k.sh} of GDSD, where `num_mc` counts pairs.
        ("diffu-grpo", {"clip": 0.5, "beta": 0.04, "inner": 12, "samples": 1}),
        ("wd1", {"inner": 12, "samples": 1, "baseline": "mean"}),
        ("spg", {"beta": 1.5, "omega": 0.5, "inner": 4, "samples": 2, "scale": "none"}),
        ("espo", {"clip": 0.2, "beta": 1e-3, "inner": 8, "samples": 2 * 2, "baseline": "loo"}),
        (
            "gdsd",
            {"clip": 4e-4, "beta": 1e-3, "psi": 10, "inner": 8, "samples": 4, "baseline": "loo"},
        ),
        # configs/rl_llada.yaml of dLLM-RL, where `shrink` is of its TraceRL; grpo.py and train.py
        # of JustGRPO; recipes/config_coupled_code.yaml of ml-diffucoder, and coupled_grpo.py.
        ("tracerl", {"clip": 0.2, "beta": 0.01, "shrink": 8, "scale": "zscore", "inner": 1}),
        ("justgrpo", {"clip": 0.2, "beta": 0, "loss_type": "dr_grpo", "scale": "group"}),
        ("justgrpo", {"baseline": "mean", "inner": 1, "until_eos": False}),
        ("coupled-grpo", {"clip": 0.5, "beta": 0.01, "inner": 2, "baseline": "loo"}),
        # bash_scripts/{train.yaml,gsm8k_d2stepmerge.sh} of d2, 8 segments of 128 steps;
        # slurm_scripts/{train.yaml,countdown_base.sbatch} of GDPO; run_bgpo_llada_8b_instruct.sh
        # of DARE and the defaults of verl under it.
        ("d2", {"clip": 0.5, "beta": 0.04, "inner": 12, "shrink": 128 // 8, "prompt_mask": 0.15}),
        ("gdpo", {"clip": 0.5, "beta": 0, "inner": 12, "samples": 3, "law": "quadrature"}),
        ("gdpo", {"baseline": "mean", "scale": "none", "until_eos": False}),
        ("bgpo", {"clip": 0.2, "dual_clip": 3, "inner": 1, "samples": 16, "scale": "group"}),
        ("coupled-grpo", {"scale": "none", "samples": 3, "until_eos": True}),
        # GRPOConfig of TRL 1.16.
        ("grpo", {"clip": 0.2, "beta": 0, "loss_type": "dapo", "inner": 1, "scale": "group"}),
    ],
)
def test_constants_are_those_that_the_authors_released(algo, told):
    recipe = RECIPES[algo]
    for name, value in told.items():
        assert {**vars(recipe), **recipe.constants}[name] == value


def test_what_is_given_wins_over_the_table():
    assert Constants(beta=0.5).of("espo") == {"clip": 0.2, "beta": 0.5}
    assert Constants().of("reinforce")["strength"] == 0
    assert make_objective("gdsd", psi=2.0).psi == 2


def test_an_option_that_an_algorithm_lacks_is_refused():
    for algo, name, own in (
        ("espo", "psi", "--clip, --beta"),
        ("reinforce", "strength", "--score-norm"),
        ("reinforce", "center", "--score-norm"),
        ("wd1", "beta", "none"),
        ("sft", "clip", "none"),
    ):
        option = {"strength": "--lambda"}.get(name, f"--{name}")
        with pytest.raises(UsageError, match=f"{option} means nothing to --algo {algo}; .* {own}$"):
            Constants(**{name: 0.1}).of(algo)


@pytest.mark.parametrize(
    ("algo", "why"),
    [
        ("gdsd", "under a mask and its complement"),
        ("tracerl", "steps that denoised a completion"),
        ("d2", "steps that denoised a completion"),
    ],
)
def test_what_needs_masks_refuses_an_autoregressive_model(algo, why):
    check_kind(algo, True, "m")
    with pytest.raises(
        UsageError, match=rf"{algo} trains diffusion models alone.*{why}, and m is autoregressive"
    ):
        check_kind(algo, False, "m")


def test_all_others_train_both_kinds():
    for algo in {*RECIPES} - {"gdsd", "tracerl", "d2"}:
        check_kind(algo, True, "m")
        check_kind(algo, False, "m")
