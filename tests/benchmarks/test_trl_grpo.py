"""The losses of `update --algo grpo` and srpo beside those of TRL's GRPOTrainer, where installed.

TRL's own `_compute_loss` is called on the same log-probabilities: the trainer around it is a stand-
in that holds its settings, and gives these log-probabilities where a model would be run. Token
weights go in as advantages of each token, which TRL takes. With trl 1.16.0 the 40 losses and their
gradients differ by less than 1e-15.

    pip install trl accelerate datasets && pytest tests/benchmarks/test_trl_grpo.py
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmctl.rl.objectives.scores import Scores
from dlmctl.rl.objectives.table import make_objective

N, G, MAX_LENGTH = 6, 9, 12
LENGTHS = torch.tensor([9, 1, 4, 7, 2, 5])
SETTINGS = [
    {},
    {"beta": 0.04},
    {"clip": 0.1, "clip_high": 0.28},
    {"clip": 0.3, "beta": 0.01},
]


@pytest.fixture(scope="module")
def trainer() -> Any:
    return pytest.importorskip("trl", reason="trl is not installed").GRPOTrainer


def _scores() -> Scores:
    """Ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = (torch.arange(G) < LENGTHS[:, None])[:, None]
    current = -draw(N, 1, G).abs() * targets
    return Scores(
        current.requires_grad_(),
        (current.detach() + 0.4 * draw(N, 1, G)) * targets,
        (current.detach() + 0.4 * draw(N, 1, G)) * targets,
        targets,
        torch.ones(N, 1, dtype=torch.float64),
        LENGTHS.double(),
        draw(N),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        token_weights=0.8 + 0.4 * torch.rand(N, G, generator=generator, dtype=torch.float64),
    )


def _stand_in(scores: Scores, loss_type: str, settings: dict[str, float]) -> Any:
    """What `_compute_loss` asks of the trainer; one process, no gradient accumulation."""
    clip = settings.get("clip", 0.2)
    bound = 5.0 if loss_type == "cispo" else settings.get("clip_high", clip)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            scores.current[:, 0],
            torch.zeros(N, G, dtype=torch.float64),
            None,
        ),
        loss_type=loss_type,
        beta=settings.get("beta", 0.0),
        epsilon_low=clip,
        epsilon_high=bound,
        max_completion_length=MAX_LENGTH,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x, gather_for_metrics=list
        ),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )


def _inputs(scores: Scores, weighted: bool) -> dict[str, Tensor]:
    mask = scores.targets[:, 0].long()
    advantage = scores.advantage[:, None] * scores.token_weights if weighted else scores.advantage
    return {
        "prompt_ids": torch.ones(N, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(N, 1, dtype=torch.int64),
        "completion_ids": torch.ones(N, G, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": advantage,
        "old_per_token_logps": scores.old[:, 0],
        "ref_per_token_logps": scores.reference[:, 0],
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("algo", ["grpo", "srpo"])
def test_loss_gradient_and_metrics_are_those_of_trl(
    trainer: Any, algo: str, loss_type: str, settings: dict[str, float]
) -> None:
    scores = _scores()
    theirs = _stand_in(scores, loss_type, settings)
    expected = trainer._compute_loss(theirs, None, _inputs(scores, algo == "srpo"))
    (expected_gradient,) = torch.autograd.grad(expected, scores.current)

    own: dict[str, Any] = dict(settings)
    if loss_type == "cispo":
        own.pop("clip_high", None)
    if loss_type == "dr_grpo":
        own["max_length"] = MAX_LENGTH
    objective = make_objective(algo, loss_type=loss_type, **own)
    loss = objective.loss(scores)
    (gradient,) = torch.autograd.grad(loss, scores.current)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    assert float(gradient.abs().max()) > 1e-2

    found, logged = objective.metrics(scores), theirs._metrics["train"]
    names = {"k3": "kl"} if "beta" in settings else {}
    if loss_type == "cispo":
        names["clip_high"] = "cispo_clip_ratio"
    else:
        names |= {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
        assert found["clip_low"] > 0 < found["clip_high"]
    for name, their_name in names.items():
        assert found[name] == pytest.approx(logged[their_name][0], abs=1e-6)  # in float32
