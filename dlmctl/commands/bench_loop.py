"""`dlmctl bench loop`: options and wiring."""

from __future__ import annotations

from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.settings.bench import Workload
from dlmctl.settings.compute import Compute, Model
from dlmctl.settings.streams import Json, Quiet


def command(
    model: Model = "builtin:puzzles",
    work: Workload = Workload(),
    compute: Compute = Compute(batch_size=256),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare the training loop as a pipe with the same stages in one process.

    Runs rollout, verify and update (RSPO) in this process; then 'rollout --follow RUN | verify |
    update -o RUN' with lag 0, and with lag 1, where sampling and training overlap. Writes for each:
    seconds per round, the median; ratio to the first row; same, whether the final weights equal
    those of the first row (with lag 1 samples may be a round older, and then they do not).

    Examples:

    dlmctl bench loop

    dlmctl bench loop --task countdown --rounds 50
    """
    from dlmctl.bench.loop import compare_loops

    names = ["loop", "rounds", "seconds_per_round", "ratio", "same"]
    with counting("rounds", quiet, 3 * work.rounds) as gauge:
        write_rows(compare_loops(model, work, compute, [0, 1], gauge.advance), names, json)
