"""`dlmctl memo-eval theory`: options and wiring."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer

from dlmctl.commands.options import Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import write_records


def command(
    psi_n: Annotated[float, typer.Option(help="Samples for each dimension, n/d; above 1.")] = 6,
    psi_p: Annotated[
        float, typer.Option(help="Features for each dimension, p/d; above --psi-n.")
    ] = 24,
    dimension: Annotated[
        int,
        typer.Option("-d", "--dimension", min=2, help="Of the data; the work is of (p/d x d)^3."),
    ] = 50,
    time: Annotated[
        float, typer.Option("-t", "--time", help="Diffusion time at which the score is learned.")
    ] = 0.05,
    variances: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Eigenvalues of the data's covariance, in equal shares: 0.5,1.5."
        ),
    ] = "1",
    delta: Annotated[
        float, typer.Option(help="Length of the teacher's step in distillation, below --time.")
    ] = 0.04,
    teacher_tau: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            show_default="1e4",
            help="Training times of the teachers that students are distilled from; repeatable.",
        ),
    ] = None,
    taus: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Training times of the rows: numbers, or LOW:HIGH:COUNT, even in the logarithm.",
        ),
    ] = "1:1e8:33",
    student_init: Annotated[
        Literal["teacher", "zero"], typer.Option(help="Where a student starts.")
    ] = "teacher",
    lr: Annotated[
        float | None,
        typer.Option(
            show_default="gradient flow",
            help="Teachers by gradient descent of this learning rate instead, --taus being rounded "
            "to its steps.",
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learn from this many draws of the noise for each sample, always the same; "
            "0 is from all noise, exactly. Losses are under all noise.",
        ),
    ] = 0,
    noise_draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="20 p/n",
            help="Draws of the noise for each sample, for the student; the rest is exact. Not "
            "with --draws, which the student has too.",
        ),
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Eigenvalues, networks and density as safetensors.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Picture of spectrum and curves, PNG or SVG by its ending."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Memorization and distillation of a random-feature network, in closed form.

    The model of Bonnaire et al. 2025: a score network of random features learns first to
    generalize, then to memorize, and both can be computed for all training times at once. A
    student is distilled from it by consistency at one step of the probability flow; how the
    student is set up is ours. Writes a record with constants, bulks of the spectrum with their
    training times, and for each student the instability kappa of each bulk; then one for each role
    and training time. A teacher has its loss on the training set and on fresh data (train, test)
    and the error of the score, a student map_err, the error of the data that it makes of a noisy
    sample against the end of the exact probability flow. Both have norms within the bulks and gap:
    how much nearer to the data they come if it is of the training set, in units of the loss (test
    less train of a teacher). A student moves a sample less than a denoiser does: gap and norms are
    to be compared within a role.

    With --draws, as simulations have it, networks learn the draws of the noise too, and the error
    of the score is larger, in proportion to 1 / --draws.

    Examples:

    dlmctl memo-eval theory --teacher-tau 1e4,1e6 --plot theory.png > theory.jsonl

    dlmctl memo-eval theory --draws 100 --taus 10,30,100 > drawn.jsonl

    dlmctl plot theory.jsonl -x tau --log-x -y map_err -y gap --by role,teacher_tau -o curves.png
    """
    if plot and plot.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {plot} ends neither in .png nor in .svg")
    own_variances = numbers("--variances", variances)
    ends = [numbers("--teacher-tau", text) for text in teacher_tau or ["1e4"]]
    times = numbers("--taus", taus)
    from dlmctl.memorization.theory.study import Plan, Setting, study

    setting = Setting(psi_n, psi_p, dimension, time, tuple(own_variances))
    found = study(
        setting,
        Plan(
            times, [*chain(*ends)], delta, student_init == "teacher", noise_draws, draws, seed, lr
        ),
    )
    if output:
        from safetensors.torch import save

        write_file(output, save({n: t.contiguous() for n, t in found.tensors().items()}))
    count = len(times) * (1 + len(found.students))
    header, rows = found.header(), [*counted(found.rows(), "rows", quiet, count)]
    write_records([header, *rows])
    if plot:
        from dlmctl.report.spectrum import draw_theory

        limit = found.density.at.tolist(), found.density.values.tolist()
        eigenvalues = found.problem.values.tolist()
        kind = plot.suffix.lower().removeprefix(".")
        write_file(plot, draw_theory(header, rows, eigenvalues, limit, kind))


def numbers(option: str, text: str) -> list[float]:
    """The numbers of a list like 1,10,1e3, or LOW:HIGH:COUNT; raises UsageError otherwise."""
    try:
        if ":" not in text:
            found = [float(part) for part in text.split(",")]
            if not all(map(math.isfinite, found)):
                raise ValueError
            return found
        low, high, count = text.split(":")
        first, last, many = float(low), float(high), int(count)
        if not 0 < first < last < math.inf or many < 2:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{option} {text} is neither a list of numbers nor LOW:HIGH:COUNT with 0 < LOW < HIGH"
        ) from None
    ratio = (last / first) ** (1 / (many - 1))
    return [first * ratio**number for number in range(many - 1)] + [last]
