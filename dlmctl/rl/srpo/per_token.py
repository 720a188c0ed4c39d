"""What records have for each token of their completion, as tables for objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, object_field


def token_weights(records: Sequence[Record], examples: Sequence[Example]) -> Tensor:
    """`weights` of every record: float64 [N, G], 1 behind the end of a completion.

    Raises:
        DataError: a record has none, or not one positive number for each token.
    """
    table = torch.ones(len(records), max(len(example.completion) for example in examples))
    table = table.double()
    for n, (record, example) in enumerate(zip(records, examples, strict=True)):
        count = len(example.completion)
        numbers = number_list(record.get("weights"), count)
        if numbers is None or not bool((numbers > 0).all()):
            fault = "is missing" if record.get("weights") is None else "is something else"
            raise DataError(
                f"field 'weights' {fault}, expected {count} positive numbers, one for each token "
                "of the completion; 'dlmctl advantage --algo srpo' writes it",
                record.where,
            )
        table[n, :count] = numbers
    return table


def sampled_log_probs(records: Sequence[Record], examples: Sequence[Example]) -> Tensor | None:
    """`rollout.log_probs` of autoregressive completions: float64 [N, 1, G] in nats, 0 elsewhere.

    None if a record does not have one number for each token, as completions of other programs.
    """
    table = torch.zeros(len(records), 1, max(len(example.completion) for example in examples))
    table = table.double()
    for n, (record, example) in enumerate(zip(records, examples, strict=True)):
        count = len(example.completion)
        numbers = number_list(object_field(record, "rollout").get("log_probs"), count)
        if numbers is None:
            return None
        table[n, 0, :count] = numbers * example.masks.scored
    return table


def number_list(values: Any, count: int) -> Tensor | None:
    """float64 [count]; None if it is not a list of this many finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers if bool(numbers.isfinite().all()) else None
