"""One RSPO gradient, compared with the plain implementation that keeps full logits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.bench.shapes import random_prompts
from dlmctl.diffusion.elbo import Example, log_probs
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.objectives.rspo import residual_weights
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.settings.algorithms import RECIPES
from dlmctl.settings.bench import GradientStep
from dlmctl.train.lora import adapter_off, has_adapter


def compare_gradients(
    policy: Policy, other: Policy | None, step: GradientStep, batch_sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Scores under policy and reference and the gradient of one RSPO step, plain and as `update`.

    Args:
        other: the reference; None if `policy` has an adapter to switch off.
        batch_sizes: sequences in a pass of `update`, a row for each; the plain implementation runs
            all masks of a completion together.

    Yields:
        Dicts with seconds, the best of the runs; ratio, the first row's seconds to these;
        peak_memory_mb, on top of the weights; memory_ratio, to the first row's; difference, of the
        gradient to the first row's, relative to its norm.

    Raises:
        UsageError: the model is autoregressive.
    """
    if not policy.diffusion:
        raise UsageError("bench update measures diffusion models")
    work = GradientWork(policy, other, step)
    base: dict[str, Any] = {}
    for size in (None, *batch_sizes):
        seconds, peak = float("inf"), Peak(policy.device)
        for _ in range(step.repeats):
            policy.model.zero_grad(set_to_none=True)
            with peak:
                begun = time.perf_counter()
                work.plain() if size is None else work.update(size)
                synchronize(policy.device)
                seconds = min(seconds, time.perf_counter() - begun)
        parameters = policy.model.parameters()
        gradient = torch.cat([p.grad.flatten().cpu() for p in parameters if p.grad is not None])
        policy.model.zero_grad(set_to_none=True)
        base = base or {"seconds": seconds, "peak": peak.megabytes, "gradient": gradient}
        error = (gradient - base["gradient"]).norm() / base["gradient"].norm()
        yield {
            "path": "plain" if size is None else "update",
            "batch_size": size or step.masks,
            "completions": step.completions,
            "masks": step.masks,
            "length": step.gen_length,
            "seconds": seconds,
            "ratio": base["seconds"] / seconds,
            "peak_memory_mb": peak.megabytes,
            "memory_ratio": None if peak.megabytes is None else peak.megabytes / base["peak"],
            "difference": float(error),
        }


class GradientWork:
    """One RSPO gradient on random completions of one random prompt; arguments as above."""

    def __init__(self, policy: Policy, other: Policy | None, step: GradientStep) -> None:
        (prompt,) = random_prompts(policy, 1, step.prompt_length, step.prompt_length)
        texts = random_prompts(policy, step.completions, step.gen_length, step.gen_length)
        self.policy, self.other = policy, other
        self.plan = MaskPlan("stratified", step.masks, step.seed)
        self.records = [
            Record(
                id="random",
                sample=n,
                tokens={"prompt": prompt, "completion": tokens},
                advantage=0.5 if n % 2 == 0 else -0.5,
            )
            for n, tokens in enumerate(texts)
        ]

    def plain(self) -> None:
        """Add the gradient to the parameters, as `plain_gradient` computes it."""
        strength = RECIPES["rspo"].constants["strength"]
        plain_gradient(self.policy, self._under_reference, self.records, self.plan, strength)

    def update(self, size: int) -> None:
        """Add the gradient to the parameters as `update` does, `size` sequences in a pass."""

        def under_reference(examples: Sequence[Example]) -> Tensor:
            return self._under_reference(lambda policy: log_probs(policy, examples, size))

        frozen = Reference("reference", under_reference)
        objective, batching = make_objective("rspo"), Batching(self.plan)
        for _ in policy_gradients(self.policy, frozen, [self.records], objective, batching, size):
            pass

    def scores(self, size: int) -> Tensor:
        """Log-probabilities as `score-elbo` computes them: float64 [N, K, G] on the CPU."""
        examples = [example_of(record, self.policy, self.plan) for record in self.records]
        return log_probs(self.policy, examples, size)

    def _under_reference(self, score: Callable[[Policy], Tensor]) -> Tensor:
        with adapter_off(self.policy) if has_adapter(self.policy) else contextlib.nullcontext():
            return score(self.other or self.policy)


def plain_gradient(
    policy: Policy,
    reference: Callable[[Callable[[Policy], Tensor]], Tensor],
    records: Sequence[Record],
    plan: MaskPlan,
    strength: float,
) -> None:
    """RSPO's gradient as it is commonly written: logits at every position of every sequence."""
    examples = [example_of(record, policy, plan) for record in records]
    advantage = torch.tensor([record["advantage"] for record in records], dtype=torch.float64)

    def elbo(of: Policy, example: Example) -> Tensor:
        sums = _full_log_probs(of, example).double().cpu()
        return (sums * example.masks.weights).mean()

    def scores(of: Policy) -> Tensor:
        with torch.no_grad():
            return torch.stack([elbo(of, example) for example in examples])

    relative = scores(policy) - reference(scores)
    weights = residual_weights(advantage, relative, strength).weights
    for weight, example in zip(weights, examples, strict=True):
        loss = -weight * elbo(policy, example) / len(examples)
        loss.backward()


def _full_log_probs(policy: Policy, example: Example) -> Tensor:
    """Sum over the masked tokens of each mask, [K]."""
    prompt, completion = torch.tensor(example.prompt), torch.tensor(example.completion)
    masked = example.masks.masked
    tokens = completion.masked_fill(masked, policy.mask_id or 0)
    ids = torch.cat([prompt.expand(len(masked), -1), tokens], dim=1).to(policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits
    start = len(prompt) - policy.shift
    log_p = logits.float().log_softmax(-1)[:, start : start + len(completion)]  # [K, L, V]
    goals = completion.to(policy.device).expand(len(masked), -1)
    chosen = log_p.gather(2, goals[:, :, None])[:, :, 0]
    return (chosen * masked.to(policy.device)).sum(dim=1)
