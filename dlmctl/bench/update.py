"""One RSPO gradient beside the plain implementation that keeps full logits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from dlmctl.train.lora import adapter_off, has_adapter

Scorer = Callable[[Sequence[Example]], Tensor]


def compare_gradients(
    policy: Policy,
    other: Policy | None,
    prompt_length: int,
    gen_length: int,
    completions: int,
    masks: int,
    batch_sizes: Sequence[int],
    repeats: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Scores under policy and reference and the gradient of one RSPO step, plain and as `update`.

    Args:
        other: the reference; None where `policy` has an adapter to switch off.
        batch_sizes: sequences in a pass of `update`, a row for each; the plain one takes the masks
            of a completion together.

    Yields:
        Dicts with seconds, the best of `repeats`; ratio, the first row's seconds to these;
        peak_memory_mb, on top of the weights; memory_ratio, to the first row's; difference, of the
        gradient to the first row's, relative to its norm.
    """
    if not policy.diffusion:
        raise UsageError("bench update measures diffusion models")
    records = _records(policy, prompt_length, gen_length, completions)
    plan = MaskPlan("stratified", masks, seed)
    objective, strength = make_objective("rspo"), RECIPES["rspo"].constants["strength"]

    def reference(score: Callable[[Policy], Tensor]) -> Tensor:
        with adapter_off(policy) if has_adapter(policy) else contextlib.nullcontext():
            return score(other or policy)

    def plain() -> None:
        plain_gradient(policy, reference, records, plan, strength)

    def ours(batch_size: int) -> None:
        frozen = Reference(
            "reference", lambda examples: reference(lambda p: log_probs(p, examples, batch_size))
        )
        for _ in policy_gradients(policy, frozen, [records], objective, Batching(plan), batch_size):
            pass

    base: dict[str, Any] = {}
    for size in (None, *batch_sizes):
        work = plain if size is None else partial(ours, size)
        seconds, peak, gradient = _measured(policy, work, repeats)
        base = base or {"seconds": seconds, "peak": peak, "gradient": gradient}
        away = (gradient - base["gradient"]).norm() / base["gradient"].norm()
        yield {
            "path": "plain" if size is None else "update",
            "batch_size": size or masks,
            "completions": completions,
            "masks": masks,
            "length": gen_length,
            "seconds": seconds,
            "ratio": base["seconds"] / seconds,
            "peak_memory_mb": peak,
            "memory_ratio": None if peak is None else peak / base["peak"],
            "difference": float(away),
        }


def plain_gradient(
    policy: Policy,
    reference: Callable[[Callable[[Policy], Tensor]], Tensor],
    records: Sequence[Record],
    plan: MaskPlan,
    strength: float,
) -> None:
    """RSPO's gradient as it is commonly written: logits of every position of every sequence."""
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
    """Sum over the hidden tokens of each mask, [K]."""
    prompt, completion = torch.tensor(example.prompt), torch.tensor(example.completion)
    hidden = example.masks.hidden
    tokens = completion.masked_fill(hidden, policy.mask_id or 0)
    ids = torch.cat([prompt.expand(len(hidden), -1), tokens], dim=1).to(policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits
    start = len(prompt) - policy.shift
    found = logits.float().log_softmax(-1)[:, start : start + len(completion)]
    goals = completion.to(policy.device).expand(len(hidden), -1)
    chosen = found.gather(2, goals[:, :, None])[:, :, 0]
    return (chosen * hidden.to(policy.device)).sum(dim=1)


def _measured(
    policy: Policy, work: Callable[[], None], repeats: int
) -> tuple[float, float | None, Tensor]:
    """Seconds, megabytes, and the gradient on the CPU."""
    best, peak = float("inf"), Peak(policy.device)
    for _ in range(repeats):
        policy.model.zero_grad(set_to_none=True)
        with peak:
            begun = time.perf_counter()
            work()
            synchronize(policy.device)
            best = min(best, time.perf_counter() - begun)
    found = [p.grad.flatten().cpu() for p in policy.model.parameters() if p.grad is not None]
    policy.model.zero_grad(set_to_none=True)
    return best, peak.megabytes, torch.cat(found)


def _records(policy: Policy, prompt_length: int, gen_length: int, completions: int) -> list[Record]:
    """Completions of random ids for one prompt, good and bad in turn."""
    (prompt,) = random_prompts(policy, 1, prompt_length, prompt_length)
    texts = random_prompts(policy, completions, gen_length, gen_length)
    return [
        Record(
            id="random",
            sample=n,
            tokens={"prompt": prompt, "completion": tokens},
            advantage=0.5 if n % 2 == 0 else -0.5,
        )
        for n, tokens in enumerate(texts)
    ]
