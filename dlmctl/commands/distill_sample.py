"""`dlmctl distill sample`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import CannotCreateError, UsageError
from dlmctl.settings import Knob
from dlmctl.settings.compute import DeviceName, Seed
from dlmctl.settings.distill import Solver
from dlmctl.settings.images import ImageReading
from dlmctl.settings.parsing import float_grid, whole_numbers
from dlmctl.settings.streams import Json, Quiet

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("samples", "count", "kind", "step", "seed", "steps", "evaluations")


def command(
    model: Annotated[
        str,
        Knob(
            "A run of 'dlmctl distill', one of its checkpoints, a pipeline of diffusers, or "
            "optimal:IMAGES, the exact denoiser of a set.",
            metavar="MODEL",
            argument=True,
        ),
    ],
    output: Annotated[
        Path,
        Knob(
            "File of the samples: safetensors, which can be used as IMAGES anywhere. {step} in its "
            "name stands for the step of the checkpoint.",
            "-o",
            "--output",
            metavar="FILE",
        ),
    ],
    count: Annotated[int, Knob("Number of samples.", "-n", "--samples", minimum=1)] = 1000,
    steps: Annotated[
        int | None,
        Knob(
            "Sampling steps. A student that takes several adds noise again between them.",
            "--steps",
            minimum=1,
            shown_default="18 for a denoiser, 1 for a student",
        ),
    ] = None,
    visited: Annotated[
        str | None,
        Knob(
            "Noise levels of a student's steps, in place of --steps: 80,0.5 samples in two. The "
            "first is that of the noise it begins with.",
            "--levels",
            metavar="SIGMA,…",
            shown_default="spread as the grid of training",
        ),
    ] = None,
    solver: Annotated[
        Solver | None,
        Knob(
            "Solver of a denoiser's ODE: heun evaluates the model twice per step, except in the "
            "last.",
            "--solver",
            shown_default="heun",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        Knob(
            "Texts for a text-to-image pipeline: lines of a .txt file, or rows with a column "
            "prompt, text or caption. Sample i is of text i, and begins again after the last.",
            "--prompts",
            metavar="FILE",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        Knob(
            "Guidance scale of a text-to-image pipeline, as diffusers counts it; 1 is none.",
            "--guidance",
            minimum=1.0,
            shown_default="7.5",
        ),
    ] = None,
    at: Annotated[
        str | None,
        Knob(
            "Steps of the run's checkpoints to sample from, separated by commas, or all.",
            "--at",
            metavar="STEPS",
            shown_default="the newest",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        Knob(
            "Samples per batch; changes speed and memory, not results.",
            "-b",
            "--batch-size",
            minimum=1,
            env=True,
        ),
    ] = 256,
    seed: Seed = 0,
    reading: ImageReading = ImageReading(),
    device: DeviceName = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Sample images or vectors from a teacher or a student.

    A denoiser follows the ODE of EDM from sigma_max to 0; a student maps noise to an image in one
    step. With the same seed, sample i starts from the same noise in every model, whatever the
    number of samples and steps. Latents of a pipeline with a VAE are decoded. Writes one record per
    file, with the model and the number of its evaluations for each sample.

    Examples:

    dlmctl distill sample runs/teacher -n 1000 -o teacher.safetensors

    dlmctl distill sample runs/student -n 1000 --steps 2 --at 850 -o student.safetensors

    dlmctl distill sample runs/student --at all -o student-{step}.safetensors
    """
    from dlmctl.distill.image_checkpoints import OPTIMAL, load_model, load_text_model
    from dlmctl.distill.image_sampling import draw, evaluations, levels, student_levels
    from dlmctl.distill.image_sets import origin
    from dlmctl.distill.text_runs import read_texts
    from dlmctl.models.loading import resolve_device

    if guidance and not prompts:
        raise UsageError("--guidance is for models of texts, which have --prompts")
    if visited and steps:
        raise UsageError("--levels says how many steps there are: leave --steps out")
    if reading != ImageReading() and not model.startswith(OPTIMAL):
        raise UsageError("--resize, --crop and --gray are for optimal:IMAGES")
    given = float_grid("--levels", visited) if visited else []
    place = resolve_device(device)
    texts, scale = read_texts(prompts) if prompts else [], guidance or 7.5
    points = _checkpoints(model, at, output)
    rows = []
    with counting("samples", quiet, count * len(points)) as gauge:
        for point in points:
            if texts:
                loaded = load_text_model(model, texts, scale, place, point)
            else:
                loaded = load_model(model, place, point, reading)
            if loaded.kind == "consistency" and solver:
                raise UsageError(
                    f"--solver is for denoisers, and {model} is a student without an ODE"
                )
            if given and loaded.kind != "consistency":
                raise UsageError(f"--levels is for students, and {model} is a denoiser")
            taken = len(given) or steps or (1 if loaded.kind == "consistency" else 18)
            sigmas = student_levels(loaded, given) if given else levels(loaded, taken)
            samples = draw(loaded, count, seed, sigmas, solver or "heun", batch_size, gauge.advance)
            trained = (loaded.training or {}).get("step")
            file = Path(str(output).replace("{step}", str(trained)))
            row = {
                "samples": str(file),
                "count": count,
                "model": model,
                "kind": loaded.kind,
                "step": trained,
                "revision": loaded.revision,
                **({} if loaded.autoencoder else origin(loaded.training or {})),
                "seed": seed,
                "steps": taken,
                **({"levels": given} if given else {}),
                **({"prompts": prompts, "guidance": scale} if prompts else {}),
                "evaluations": evaluations(loaded, taken, solver or "heun"),
            }
            _write(file, samples, row)
            rows.append(row)
    write_rows(rows, COLUMNS, json)


def _checkpoints(model: str, at: str | None, output: Path) -> list[int | None]:
    """The steps that --at names; None is the newest."""
    from dlmctl.distill.image_checkpoints import checkpoint_steps

    if at is None:
        return [None]
    steps: list[int | None] = []
    if at == "all":
        steps += checkpoint_steps(Path(model))
        if not steps:
            raise UsageError(f"--at all: {model} is not a run with checkpoints")
    else:
        steps += whole_numbers("--at", at)
    if len(steps) > 1 and "{step}" not in output.name:
        raise UsageError(f"--at {at} needs {{step}} in the name of -o, to write a file for each")
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
