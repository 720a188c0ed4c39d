"""Settings of distillation: what is left out takes the default of the objective."""

import dataclasses

import pytest

from dlmctl.records.errors import UsageError
from dlmctl.settings.distill import Distillation
from dlmctl.settings.images import NoiseRange


def test_defaults_depend_on_the_objective():
    cd, ect = Distillation(), Distillation("ect")
    assert (cd.solver, cd.scales, cd.target_ema, cd.metric) == ("heun", 40, 0.95, "l2")
    assert (ect.target_ema, ect.metric) == (0.0, "huber")
    assert Distillation("ect", target_ema=0.5, metric="l2").target_ema == 0.5
    assert Distillation(target_ema=0.0).target_ema == 0.0
    assert ect.steps_per_stage(20) == 2.5
    assert (
        dataclasses.replace(ect, solver=None, scales=None, stage_steps=3).steps_per_stage(20) == 3
    )


@pytest.mark.parametrize("options", [{"stage_steps": 5}, {"objective": "ct", "solver": "heun"}])
def test_options_of_another_objective_are_refused(options):
    with pytest.raises(UsageError, match="is not for --objective"):
        Distillation(**options)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_noise_levels_are_a_range(ends):
    with pytest.raises(UsageError, match="--sigma-min"):
        NoiseRange(*ends)
