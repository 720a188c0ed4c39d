"""`dlmctl bench`: measurements compared with a baseline in the same run, and those of a device."""

from __future__ import annotations

from dlmctl.commands import bench_gpu, bench_loop, bench_rollout, bench_update

COMMANDS = {
    "gpu": bench_gpu.command,
    "loop": bench_loop.command,
    "rollout": bench_rollout.command,
    "update": bench_update.command,
}
