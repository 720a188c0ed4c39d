"""`dlmctl bench`: measurements, each beside its baseline in the same run."""

from __future__ import annotations

from dlmctl.commands import (
    bench_credit,
    bench_elbo,
    bench_loop,
    bench_neighbours,
    bench_rollout,
    bench_sae,
    bench_update,
)

COMMANDS = {
    "credit": bench_credit.command,
    "elbo": bench_elbo.command,
    "loop": bench_loop.command,
    "neighbours": bench_neighbours.command,
    "rollout": bench_rollout.command,
    "sae": bench_sae.command,
    "update": bench_update.command,
}
