"""The stage `score-elbo`: the ELBO of every completion under labelled models, with its masks' law.

A score carries what its masks depend on, so that a difference of two scores is taken only where
both were made with the same masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example, log_probs, scored_tokens, summarize
from dlmctl.diffusion.masks import MaskSet, draw_masks, padded
from dlmctl.models.attention import Blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.records.groups import group_size
from dlmctl.records.jsonl import OnError, Record, each, field, object_field
from dlmctl.settings.algorithms import Recipe
from dlmctl.settings.mask_laws import ALL, ORDERED, TOGETHER, Law
from dlmctl.settings.masks import Masks


@dataclass(frozen=True)
class MaskPlan:
    """Everything that the masks of a record depend on, except its id and sample."""

    law: Law = "stratified"
    samples: int = 4
    """Masks, that is forward passes, for each completion; ALL: every one of an ordered law."""
    seed: int = 0
    until_eos: bool = False
    """Score tokens up to and including the first end-of-sequence, instead of all of them."""
    prompt_mask: float = 0.0
    """Probability that a prompt token is masked as well; for `block`, one before the block too."""
    block_length: int | None = None
    """Of the law `block`; None is the model's own."""
    draw: int = 0
    """Independent draws of the masks of the same records have numbers of their own."""
    levels: tuple[float, float] = (0.0, 1.0)
    """Range of t, for the laws independent and quadrature."""
    shrink: int = 1
    """Steps of the sampler that are one mask, for the law trajectory."""


def mask_plan(
    masks: Masks,
    seed: int,
    recipe: Recipe = Recipe("score-elbo"),
    levels: tuple[float, float] = (0.0, 1.0),
) -> MaskPlan:
    """The masks that the options ask for; what is None is as the recipe has it.

    An ordered law that is asked for has all its masks, unless their number is given.
    """
    usual = ALL if masks.law in ORDERED else recipe.samples
    return MaskPlan(
        masks.law or recipe.law,
        masks.samples or usual,
        seed,
        recipe.until_eos if masks.until_eos is None else masks.until_eos,
        recipe.prompt_mask if masks.prompt_mask is None else masks.prompt_mask,
        masks.block_length,
        levels=levels,
        shrink=masks.shrink or recipe.shrink,
    )


def example_of(record: Record, policy: Policy, plan: MaskPlan) -> Example:
    """The ids of a record and its masks; text is tokenized only where ids are missing.

    Raises:
        DataError: the record has neither ids nor text, an empty completion, no prompt for an
            autoregressive model to begin from, or not the order that the law follows.
    """
    prompt, completion = policy.encode_both(record)
    if not completion:
        raise DataError("the completion is empty; there is nothing to score", record.where)
    if not prompt and not policy.diffusion:
        raise DataError(
            "the prompt is empty; an autoregressive model predicts the first token from one",
            record.where,
        )
    record_id = field(record, "id", (str, int), "'dlmctl prompts' writes it")
    # A prompt that comes again in a later round has masks of its own there.
    keys = (plan.seed, record_id, object_field(record, "rollout").get("round", 0), plan.draw)
    sample = field(record, "sample", int) if "sample" in record else 0
    group = group_size(record) or 1
    follows = plan.law == "trajectory" and policy.diffusion
    order = decoding_order(record, len(completion)) if follows else None
    masks = completion_masks(policy, len(prompt), completion, plan, keys, sample, group, order)
    return Example(prompt, completion, masks, policy.pictures(record))


def decoding_order(record: Record, length: int) -> list[int]:
    """`rollout.order`: the step that decided each of the `length` tokens of a completion.

    Raises:
        DataError: the record has none, or not one number for each token, or some tokens were
            replaced: then an earlier step saw other tokens than the completion has.
    """
    rollout = object_field(record, "rollout")
    if edits := rollout.get("edits"):
        raise DataError(
            f"'rollout.edits' is {edits!s:.20}: tokens were replaced after they were decided, and "
            "their order does not say what each step saw; sample with --edit-threshold 1",
            record.where,
        )
    order = rollout.get("order")
    if isinstance(order, list) and [type(step) for step in order] == [int] * length:
        return order
    fault = "is missing" if order is None else "is something else"
    raise DataError(
        f"field 'rollout.order' {fault}, expected {length} numbers, the step that decided each "
        "token of the completion; 'dlmctl rollout' writes it",
        record.where,
    )


def completion_masks(
    policy: Policy,
    prompt_length: int,
    completion: Sequence[int],
    plan: MaskPlan,
    keys: Sequence[str | int],
    sample: int,
    group: int = 1,
    order: Sequence[int] | None = None,
) -> MaskSet:
    """The masks of one completion; for an autoregressive policy one set that scores every token.

    Args:
        group: how many samples its prompt has.
        order: the step that decided each token, for the law trajectory.
    """
    scored = scored_tokens(completion, policy, plan.until_eos)
    if not policy.diffusion:
        return MaskSet(scored[None], torch.ones(1, dtype=torch.float64), scored)
    if policy.blocks is not None and plan.law in ORDERED:
        order = steps_of_blocks(order or range(len(completion)), policy.blocks, prompt_length)
    return draw_masks(
        plan.law,
        plan.samples,
        scored,
        keys,
        sample,
        _block_length(policy, plan),
        prompt_length,
        plan.prompt_mask,
        plan.levels,
        group,
        order,
        plan.shrink,
    )


def steps_of_blocks(order: Sequence[int], blocks: Blocks, prompt_length: int) -> list[int]:
    """The step that decided each token, counted from 0 in its own block.

    Blocks do not see the noise of each other, so that one mask has the same step of all of them.
    """
    positions = torch.arange(prompt_length, prompt_length + len(order))[None]
    numbers = blocks.of(positions, torch.tensor([prompt_length]))[0].tolist()
    steps: dict[int, set[int]] = {}
    for number, step in zip(numbers, order, strict=True):
        steps.setdefault(number, set()).add(step)
    ranks = {n: {step: rank for rank, step in enumerate(sorted(steps[n]))} for n in steps}
    return [ranks[number][step] for number, step in zip(numbers, order, strict=True)]


def even_masks(examples: Sequence[Example]) -> list[Example]:
    """The examples with as many masks each; those that lack some get empty ones."""
    most = max(len(example.masks.weights) for example in examples)
    return [example._replace(masks=padded(example.masks, most)) for example in examples]


def scorable(
    records: Iterable[Record], policies: Sequence[Policy], plan: MaskPlan, on_error: OnError
) -> list[Record]:
    """The records that all of the policies can score.

    Raises:
        DataError: one is another (only with `on_error="fail"`).
    """
    return [r for r in _checked(records, policies, plan, on_error) if "error" not in r]


def _checked(
    records: Iterable[Record], policies: Sequence[Policy], plan: MaskPlan, on_error: OnError
) -> Iterator[Record]:
    def prepare(record: Record) -> Record:
        ready = Record(record)
        ready.where = record.where
        for policy in policies:
            example_of(ready, policy, plan)
        return ready

    return each(records, prepare, on_error)


def _block_length(policy: Policy, plan: MaskPlan) -> int:
    return plan.block_length or policy.sampling.get("block_length") or 32


def score(
    records: Iterable[Record],
    policies: Mapping[str, Policy],
    plan: MaskPlan,
    batch_size: int,
    on_error: OnError = "fail",
) -> Iterator[Record]:
    """Add `elbo[label]` for every labelled policy."""
    stream = _checked(records, [*policies.values()], plan, on_error)
    while batch := list(islice(stream, batch_size)):
        sound = [record for record in batch if "error" not in record]
        for label, policy in policies.items() if sound else ():
            examples = [example_of(record, policy, plan) for record in sound]
            sums = log_probs(policy, even_masks(examples), batch_size).sum(dim=2)
            for record, example, row in zip(sound, examples, sums, strict=True):
                weights = example.masks.weights
                entry = score_entry(policy, plan, example, row[: len(weights)] * weights)
                record["elbo"] = {**(record.get("elbo") or {}), label: entry}
        yield from batch


def score_entry(
    policy: Policy, plan: MaskPlan, example: Example, samples: Tensor
) -> dict[str, Any]:
    """A score as it stands in a record."""
    together = TOGETHER.get(plan.law, 1) if policy.diffusion else 1
    exact = not policy.diffusion or (plan.law in ORDERED and plan.samples == ALL)
    result = summarize(samples.view(-1, together).mean(dim=1), paired=False, exact=exact)
    return {
        "value": result.value,
        "stderr": result.stderr,
        "samples": samples.tolist(),
        "tokens": int(example.masks.scored.sum()),
        **made_by(policy, plan),
    }


def made_by(policy: Policy, plan: MaskPlan) -> dict[str, Any]:
    """What a score depends on, except the record."""
    return {
        "masks": masks_by(policy, plan),
        "model": policy.name,
        "revision": policy.revision,
    }


def masks_by(policy: Policy, plan: MaskPlan) -> dict[str, Any] | str:
    """The masks of a plan as a score names them: the same for two scores if their masks are."""
    if not policy.diffusion:
        return "exact until eos" if plan.until_eos else "exact"
    # Of `block` alone, so that two models with blocks of their own share the masks of other laws.
    block_length = _block_length(policy, plan) if plan.law == "block" else None
    named = {**asdict(plan), "block_length": block_length, "levels": list(plan.levels)}
    if plan.law != "trajectory":
        del named["shrink"]
    return named
