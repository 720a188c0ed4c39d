"""Seconds of a stage."""

from __future__ import annotations

from typing import Any

from dlmctl.settings.plan import Machine


def add_seconds(
    record: dict[str, Any], machine: Machine, speed: float | None, gpus: int, tokens: int
) -> None:
    """Add the seconds that a stage takes, if what they depend on is known.

    Args:
        speed: operations a second of one device.
        tokens: what `rollout` samples in a step.
    """
    moved = record.get("gather", 0) + record.get("scatter", 0)
    bandwidth, tokens_per_second = machine.bandwidth, machine.tokens_per_second
    if moved and bandwidth is not None:
        record["traffic_seconds"] = moved / (bandwidth * 1e9)
    if speed is None:
        return
    record["compute_seconds"] = record["flops"] / speed / gpus
    if record["stage"] == "rollout" and tokens_per_second is not None:
        record["compute_seconds"] = tokens / tokens_per_second / gpus
    if not moved or bandwidth is not None:
        record["seconds"] = record["compute_seconds"] + record.get("traffic_seconds", 0.0)
