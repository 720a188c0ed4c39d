"""`dlmctl memo-eval theory`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob
from dlmctl.settings.streams import Quiet
from dlmctl.settings.theory import FeatureModel, FeatureTraining


def command(
    model: FeatureModel = FeatureModel(),
    training: FeatureTraining = FeatureTraining(),
    output: Annotated[
        Path | None,
        Knob(
            "Write eigenvalues, networks and density as safetensors.",
            "-o",
            "--output",
            metavar="FILE",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        Knob(
            "Picture of spectrum and curves, PNG or SVG by its extension.", "--plot", metavar="FILE"
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compute memorization and distillation of a random-feature network in closed form.

    In the model of Bonnaire et al. 2025, a score network of random features first learns to
    generalize and then to memorize, and both can be computed for all training times at once. A
    student is distilled from it by consistency over one step of the probability flow; the setup of
    the student is ours. Writes a record with constants, bulks of the spectrum with their training
    times, and for each student the instability kappa of each bulk and the share of the teacher's
    weights that is kept at the end, which is kept_by_perfect for a student and a teacher that make
    no error; then one for each role and training time. A teacher has its losses on the training set
    and on fresh data (train, test) and the error of the score; a student has map_err, the error of
    the data that it makes of a noisy sample compared with the end of the exact probability flow.
    Both have norms within the bulks and gap: how much closer they come to the data if it is from
    the training set, in units of the loss (for a teacher test less train). A student moves a sample
    less than a denoiser does: compare gap and norms within a role only.

    With --draws, as in simulations, networks also learn the draws of the noise, and the error of
    the score is larger, in proportion to 1 / --draws.

    Examples:

    dlmctl memo-eval theory --teacher-tau 1e4,1e6 --plot theory.png > theory.jsonl

    dlmctl memo-eval theory --draws 100 --taus 10,30,100 > drawn.jsonl

    dlmctl plot theory.jsonl -x tau --log-x -y map_err -y gap --by role,teacher_tau -o curves.png
    """
    if plot and plot.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {plot} ends neither in .png nor in .svg")
    from dlmctl.memorization.theory.study import study

    result = study(model, training)
    if output:
        from safetensors.torch import save

        write_file(output, save({n: t.contiguous() for n, t in result.tensors().items()}))
    count = len(training.times) * (1 + len(result.students))
    header, rows = result.header(), [*counted(result.rows(), "rows", quiet, count)]
    write_records([header, *rows])
    if plot:
        from dlmctl.report.spectrum import draw_theory

        limit = result.density.at.tolist(), result.density.values.tolist()
        eigenvalues = result.problem.values.tolist()
        kept = [(kappa.tolist(), share.tolist()) for kappa, share in result.directions()]
        kind = plot.suffix.lower().removeprefix(".")
        write_file(plot, draw_theory(header, rows, eigenvalues, limit, kept, kind))
