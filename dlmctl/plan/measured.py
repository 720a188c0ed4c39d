"""Speeds of a device from the records of `dlmctl bench gpu`, carried over to what is planned.

Tokens per second depend on the model and the sampler; operations a second hardly do, if passes have
about as many tokens and the model is about as large. So every figure becomes operations a second by
plan/flops at the sizes that it was measured at, and seconds by the operations that are planned.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.weightless import weightless_policy
from dlmctl.plan.requirements import Work, sampling_operations
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, field, read_records
from dlmctl.settings.optimizer import Adapter
from dlmctl.settings.plan import Machine, Options
from dlmctl.train.lora import add_adapter

ALIKE = 4.0
"""How many times as many parameters a model may have as the one that was measured, or it as the
model: from 8 billion to 3, but not from 100 million."""
NEAR = 2.0
"""The same of the tokens in a pass of the sampler."""
HINT = "'dlmctl bench gpu' writes it"


def with_measured(machine: Machine, options: Options, work: Work) -> tuple[Machine, str]:
    """The machine with the speeds of its file of measurements, and the device that they are of.

    A speed of sampling that the machine has already is kept.

    Raises:
        UsageError: the file and an option say the same, or it does not measure such a model.
        DataError: the file lacks a figure, or has it of too different a model or passes.
        MissingInputError: there is no such file.
    """
    assert machine.measured is not None
    if machine.tflops is not None:
        raise UsageError("--tflops and --measured both say how fast a device is: leave one out")
    file = str(machine.measured)
    records = [record for record in read_records([file], "fail") if "what" in record]
    policy = weightless_policy(options.model, torch.bfloat16)
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    update = _update(records, options, file)
    _check_size(update, size, options.model, file)
    machine = replace(machine, tflops=update["tflops"])
    if work.step.rollout_batch_size and machine.tokens_per_second is None:
        if not policy.diffusion:
            raise UsageError(
                f"--measured has no speed of sampling from left to right, as {options.model} does: "
                "give --tokens-per-second too"
            )
        rollout = _rollout(records, work, file)
        _check_size(rollout, size, options.model, file)
        if options.rank:
            policy = add_adapter(policy, Adapter(options.rank))
        each = sampling_operations(policy, work) / work.sampling.gen_length
        machine = replace(machine, tokens_per_second=rollout["tflops"] * 1e12 / each)
    return machine, str(update.get("device", "unknown"))


def _update(records: list[Record], options: Options, file: str) -> Record:
    """The figure of `update`, with --gradient-checkpointing as planned if there is one."""
    known = [record for record in records if _is_figure(record, "update")]
    if not known:
        raise DataError(f"no update was measured{_why(records, 'update')}", file)
    same = (r for r in known if r.get("gradient_checkpointing") == options.gradient_checkpointing)
    return next(same, known[0])


def _rollout(records: list[Record], work: Work, file: str) -> Record:
    """The figure of the planned sampler whose passes have the most similar number of tokens."""
    sampling, rows = work.sampling, work.step.rollout_batch_size
    tokens = rows * tokens_in_pass(sampling, work.prompt_length)

    def distance(record: Record) -> tuple[float, bool]:
        ratio = field(record, "pass_tokens", int, HINT) / tokens
        drawn = field(record, "temperature", (int, float), HINT) > 0
        return max(ratio, 1 / ratio) if ratio > 0 else math.inf, drawn != (sampling.temperature > 0)

    known = [
        record
        for record in records
        if _is_figure(record, "rollout")
        and record.get("cache") == sampling.cache
        and not record.get("compile")
    ]
    near = [record for record in known if distance(record)[0] <= NEAR]
    if not near:
        raise DataError(
            f"no sampling with --cache {sampling.cache} was measured in passes of about "
            f"{tokens:,} tokens{_why(records, 'rollout')}; 'dlmctl bench gpu --batch-size {rows}' "
            "with the planned lengths does that",
            file,
        )
    return min(near, key=distance)


def tokens_in_pass(sampling: SamplerConfig, prompt_length: int) -> int:
    """Tokens of a sequence that most passes of the sampler go over."""
    short = sampling.cache == "dual"
    return sampling.block_length if short else prompt_length + sampling.gen_length


def _is_figure(record: Record, what: str) -> bool:
    """Whether a record has the operations a second of something."""
    if record.get("what") != what or record.get("tflops") is None:
        return False
    return bool(field(record, "tflops", (int, float), HINT) > 0)


def _why(records: list[Record], what: str) -> str:
    """Why it was left out, if the file says so."""
    reasons = (record.get("left_out") for record in records if record.get("what") == what)
    reason = next((reason for reason in reasons if reason), None)
    return f" (left out: {reason})" if reason else ""


def _check_size(record: Record, size: int, model: str, file: str) -> None:
    """Raise DataError if a figure is of a much smaller or larger model."""
    measured = field(record, "parameters", int, HINT)
    if not 1 / ALIKE <= measured / size <= ALIKE:
        raise DataError(
            f"it was measured on a model of {measured:,} parameters, and {model} has {size:,}: "
            "measure one of about that size ('dlmctl bench gpu -m')",
            file,
        )
