"""What the token weights of a batch were: the metrics that `update --algo srpo` adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.records.jsonl import Record
from dlmctl.rl.srpo.per_token import number_list
from dlmctl.rl.srpo.roles import PERCEPTION, REASONING

QUANTILES = (0.1, 0.9)
"""Of the signals of a role."""
ROLES = {"perception": PERCEPTION, "reasoning": REASONING}


def credit_metrics(records: Sequence[Record]) -> dict[str, Any]:
    """Of the records that have what `advantage --algo srpo` writes; {} if none has.

    Signals, weights and bounds are of the completions that were scored, format and shares of roles
    of all.

    Returns:
        format_ok; baseline in nats; weight_low and weight_high, the shares of tokens at the bounds;
        for each role the share of tokens, the mean signal in nats, its quantiles 0.1 and 0.9 (over
        tokens), and the mean weight. None where nothing was scored.
    """
    bearing = [record for record in records if isinstance(record.get("credit"), dict)]
    if not bearing:
        return {}
    scored = [record for record in bearing if record["credit"].get("scored")]
    metrics: dict[str, Any] = {
        "format_ok": _mean([record["credit"].get("format_ok") for record in bearing]),
        "baseline": _mean([record["credit"].get("baseline") for record in scored]),
        "weight_low": _mean([record["credit"].get("clipped_low") for record in scored]),
        "weight_high": _mean([record["credit"].get("clipped_high") for record in scored]),
    }
    everywhere = _of(bearing, "roles")
    roles, signal, weights = (_of(scored, name) for name in ("roles", "signal", "weights"))
    if not len(roles) == len(signal) == len(weights):
        return metrics
    for name, role in ROLES.items():
        of_role = signal[roles == role]
        metrics[f"{name}_tokens"] = _mean((everywhere == role).tolist())
        metrics[f"{name}_signal"] = _mean(of_role.tolist())
        for share in QUANTILES:
            value = float(of_role.quantile(share)) if of_role.numel() else None
            metrics[f"{name}_signal_p{round(100 * share)}"] = value
        metrics[f"{name}_weight"] = _mean(weights[roles == role].tolist())
    return metrics


def _of(records: Sequence[Record], name: str) -> Tensor:
    """float64, the numbers of all records one behind the other."""
    rows = [number_list(record.get(name), len(record.get(name) or [])) for record in records]
    there = [row for row in rows if row is not None]
    return torch.cat(there) if there else torch.zeros(0, dtype=torch.float64)


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if numbers else None
