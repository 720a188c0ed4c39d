"""What `dlmctl bench` measures."""

from __future__ import annotations

from dataclasses import dataclass

from dlmctl.settings import knob, same
from dlmctl.settings.common import Seed


@dataclass(frozen=True)
class Workload:
    """Rounds of training, all alike."""

    task: str = knob("sudoku", "Prompts, as in 'dlmctl rollout'.", "--task")
    rounds: int = knob(20, "Rounds; the first is not timed.", "--rounds", minimum=3)
    prompts: int = knob(32, "Prompts in a round.", "--prompts", minimum=1)
    samples: int = knob(8, "Completions for each prompt.", "-n", "--samples", minimum=2)
    seed: int = same(0, Seed)
