"""`dlmctl distill sample`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dlmctl.commands.options import Device, Json, Quiet, Seed
from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import CannotCreateError, UsageError
from dlmctl.settings.parsing import whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run of 'dlmctl distill', one of its checkpoints, or optimal:IMAGES, the exact "
            "denoiser of a set.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The samples, a safetensors file that every IMAGES takes; {step} in its name is "
            "the step of the checkpoint.",
        ),
    ],
    count: Annotated[int, typer.Option("-n", "--samples", min=1, help="Samples.")] = 1000,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="18 of a denoiser, 1 of a student",
            help="Steps of the sampler. A student of several adds noise again in between.",
        ),
    ] = None,
    solver: Annotated[
        Literal["heun", "euler"] | None,
        typer.Option(
            show_default="heun",
            help="Of a denoiser's ODE: heun evaluates it twice in a step, but in the last.",
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            show_default="the newest",
            help="Steps of a run's checkpoints, several with commas, or all.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "-b",
            "--batch-size",
            min=1,
            envvar="DLMCTL_BATCH_SIZE",
            help="Samples made at once; changes speed and memory, not results.",
        ),
    ] = 256,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Sample images or vectors from a teacher or a student.

    A denoiser follows the ODE of EDM from sigma_max to 0; a student maps noise to an image in one
    step. With the same seed sample i begins at the same noise in all of them, whatever the number
    of samples and steps. Writes a record for each file, with the model and its evaluations for each
    sample.

    Examples:

    dlmctl distill sample runs/teacher -n 1000 -o teacher.safetensors

    dlmctl distill sample runs/student -n 1000 --steps 2 --at 850 -o student.safetensors

    dlmctl distill sample runs/student --at all -o student-{step}.safetensors
    """
    from dlmctl.distill.image_checkpoints import load_model
    from dlmctl.distill.image_sampling import draw, evaluations
    from dlmctl.models.loading import resolve_device

    place = resolve_device(device)
    points = _checkpoints(model, at, output)
    rows = []
    with counting("samples", quiet, count * len(points)) as gauge:
        for point in points:
            found = load_model(model, place, point)
            if found.kind == "consistency" and solver:
                raise UsageError(
                    f"--solver is for denoisers, and {model} is a student without an ODE"
                )
            taken = steps or (1 if found.kind == "consistency" else 18)
            samples = draw(found, count, seed, taken, solver or "heun", batch_size, gauge.advance)
            trained = (found.training or {}).get("step")
            file = Path(str(output).replace("{step}", str(trained)))
            row = {
                "samples": str(file),
                "count": count,
                "model": model,
                "kind": found.kind,
                "step": trained,
                "revision": found.revision,
                "seed": seed,
                "steps": taken,
                "evaluations": evaluations(found, taken, solver or "heun"),
            }
            _write(file, samples, row)
            rows.append(row)
    columns = ("samples", "count", "kind", "step", "seed", "steps", "evaluations")
    write_rows(rows, columns, json)


def _checkpoints(model: str, at: str | None, output: Path) -> list[int | None]:
    """The steps that --at names; None is the newest."""
    from dlmctl.distill.image_checkpoints import checkpoint_steps

    if at is None:
        return [None]
    steps: list[int | None] = []
    if at == "all":
        steps += checkpoint_steps(Path(model))
        if not steps:
            raise UsageError(f"--at all: {model} is no run with checkpoints")
    else:
        steps += whole_numbers("--at", at)
    if len(steps) > 1 and "{step}" not in output.name:
        raise UsageError(f"--at {at}: write {{step}} into the name of -o, for a file each")
    return steps


def _write(file: Path, samples: Tensor, row: dict[str, Any]) -> None:
    from safetensors import SafetensorError

    from dlmctl.distill.image_sets import write_images
    from dlmctl.records.files import publish_file

    about = {name: str(value) for name, value in row.items() if name != "samples"}
    try:
        publish_file(file, lambda path: write_images(path, samples, about))
    except SafetensorError as error:
        raise CannotCreateError(f"cannot write {file} ({error})") from None
