"""`dlmctl bench`: measurements, each compared with its baseline in the same run."""

from __future__ import annotations

from dlmctl.commands import bench_loop, bench_rollout, bench_update

COMMANDS = {
    "loop": bench_loop.command,
    "rollout": bench_rollout.command,
    "update": bench_update.command,
}
