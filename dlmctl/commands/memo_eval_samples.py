"""`dlmctl memo-eval samples`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlmctl.commands.labels import Labels, label_fields, labelled, number_or_text
from dlmctl.commands.options import Device, Json, Memory, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import write_records
from dlmctl.settings.parsing import byte_count

if TYPE_CHECKING:
    import torch

    from dlmctl.memorization.images.sample_study import Part, Parts, Result

OF_SAMPLER = ("model", "step", "steps", "evaluations")
"""What 'distill sample' says of itself in a file, as the record of 'memo-eval' has it."""
SOURCE = (
    "builtin:digits, FILE.safetensors (bytes, or floats in [-1, 1] or [0, 1]), a directory of "
    "images, JSONL, a data set; #A:B cuts it"
)


def command(
    samples: Annotated[
        list[str],
        typer.Option(
            "--samples",
            metavar="SET",
            help=f"What was generated: {SOURCE}. Repeatable: a record for each.",
        ),
    ],
    train: Annotated[
        str, typer.Option("--train", metavar="SET", help="What the model was trained on.")
    ],
    heldout: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            show_default="none",
            help="As many images of the same kind that it was not trained on: every figure is "
            "taken against them, too. More are cut; of fewer there is a warning.",
        ),
    ] = None,
    gray: Annotated[bool, typer.Option("--gray", help="Image files by their luminance.")] = False,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=1, show_default="1/3", help="A copy has a ratio d1 / d2 below this."
        ),
    ] = 1 / 3,
    distance: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default="off",
            help="Add f_near: the share with d1 up to this, L2 of pixels in [-1, 1].",
        ),
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Leave duplicates out of training and held-out set.")
    ] = False,
    dedup_within: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="L2",
            help="With --dedup: images as near as this are duplicates, too. Near duplicates hide "
            "copies as well.",
        ),
    ] = 0.0,
    extractor: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            show_default="none",
            help="Model whose features of images are compared by cosine: config.json and "
            "safetensors, as transformers has it.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="SAMPLES,TRAIN[,HELDOUT]",
            show_default="none",
            help="Instead of --extractor: safetensors of features [N, F], a row for each image.",
        ),
    ] = None,
    copy_thresholds: Annotated[
        str,
        typer.Option(
            "--copy-threshold",
            metavar="COSINE,…",
            help="Add the share of samples with a cosine above each.",
        ),
    ] = "0.5,0.6",
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality",
            help="Fréchet distance, precision, recall, density, coverage, MMD.",
        ),
    ] = True,
    space: Annotated[
        str,
        typer.Option(
            metavar="SPACE",
            help="Of --quality: pixels, features, or pca:K, principal components of training and "
            "held-out set together; auto is features where there are such, else pca:32, or a "
            "quarter of the smallest set.",
        ),
    ] = "auto",
    ridge: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default="a singular covariance is refused",
            help="Fréchet distance: add so many mean variances along every direction.",
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("-k", min=1, help="Neighbours of precision, recall, density, coverage.")
    ] = 5,
    resamples: Annotated[
        int, typer.Option("--bootstrap", min=1, help="Resamples for intervals and for p.")
    ] = 1000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of intervals.")] = 0.95,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="A record for each sample: id, nn, d1, d2, ratio, memorized.",
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            show_default="none",
            help="Picture of samples beside their nearest images, by ratio.",
        ),
    ] = None,
    gallery_rows: Annotated[int, typer.Option(min=1, help="Samples in the picture.")] = 24,
    gallery_spread: Annotated[
        bool,
        typer.Option("--gallery-spread", help="Samples of all ratios, not those of the lowest."),
    ] = False,
    labels: Labels = None,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="FILE", help="Where the summary goes."),
    ] = "-",
    json: Json = False,
    seed: Seed = 0,
    memory: Memory = "512M",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure how much of a training set samples repeat, and how good they are.

    The ratio test: a sample is memorized where its nearest training image is less than a third as
    far as the second nearest (L2 of pixels). Cosines of features, Fréchet distance, precision,
    recall, density, coverage and MMD come beside it. Everything is taken against the held-out set,
    too: what samples have in common with images that the model never saw is no memory.

    Writes a record for each set: f_mem is the share that is memorized, f_mem_interval a bootstrap
    interval, heldout_f_mem the same of the held-out set, f_mem_excess the difference; ratio and d1
    are means; sim, sim_p95, sim_max are of cosines; mmd2_gap is MMD to the training set less MMD to
    held-out images, with p of one side by exchanging them. A share of exactly 0 or 1 has an
    interval without width: it may be wrong by up to 3 / N. Of files by 'distill sample' model, step
    (of training), steps (of the sampler) and evaluations are written, too.

    Examples:

    dlmctl memo-eval --samples s.safetensors --train builtin:digits#0:128

    dlmctl memo-eval --samples s.safetensors --train builtin:digits#0:128 --heldout
    builtin:digits#128: --gallery copies.png --rows rows.jsonl

    dlmctl memo-eval --samples s.safetensors --train d.safetensors --set role=teacher --set n=128
    """
    fields = label_fields(labels)
    thresholds = _thresholds(copy_thresholds)
    if dedup_within and not dedup:
        raise UsageError("--dedup-within is for --dedup")
    if extractor and features:
        raise UsageError("--extractor and --features are two ways to the same: give one")
    if gallery and gallery.suffix.lower() != ".png":
        raise UsageError(f"--gallery {gallery} does not end in .png")
    from dlmctl.distill.image_sets import read_about, read_images
    from dlmctl.memorization.images.nearest_ratio import Bootstrap
    from dlmctl.memorization.images.sample_study import (
        Study,
        parts,
        sample_rows,
        study_samples,
        summary,
        with_features,
    )
    from dlmctl.models.loading import resolve_device

    if gallery:
        from dlmctl.memorization.images.gallery import check_drawable, picture

    where = resolve_device(device)
    study = Study(
        threshold, distance, thresholds, dedup, dedup_within, quality, space, ridge, k,
        Bootstrap(resamples, confidence, seed), byte_count("--memory", memory), where,
    )  # fmt: skip
    if len(samples) > 1 and (rows or gallery or features):
        raise UsageError("--rows, --gallery and --features are for one --samples")
    ranges: dict[tuple[float, float], str] = {}
    known = read_images(train, gray, ranges)
    fresh = read_images(heldout, gray, ranges) if heldout else None
    said: set[str] = set()

    def studied(name: str) -> tuple[dict[str, Any], Parts, Result]:
        found = parts(read_images(name, gray, ranges), known, fresh, study)
        for note in found.notes:
            if note not in said:
                print(f"dlmctl: {note}", file=sys.stderr)
        said.update(found.notes)
        if gallery:
            check_drawable(found.samples.images)  # before anything takes long
        if extractor:
            found = with_features(found, _extracted(extractor, where))
        elif features:
            found = with_features(found, _read_features(features, heldout is not None))
        result = study_samples(found, study)
        about = {**_about(read_about(name)), **fields}
        return labelled(about, summary(found, result, study)), found, result

    if len(samples) > 1:
        found_rows = (studied(name)[0] for name in samples)
        write_records(counted(found_rows, "sets", quiet, len(samples)), output)
        return
    row, found, result = studied(samples[0])
    if rows:
        made = sample_rows(found, result, study)
        write_records(counted(made, "samples", quiet, len(found.samples.images)), rows)
    if gallery:
        write_file(gallery, picture(found, result, study.threshold, gallery_rows, gallery_spread))
    if json or output != "-" or not sys.stdout.isatty():
        write_records([row], output)
    else:
        _table(found, result)


def _about(written: dict[str, str]) -> dict[str, Any]:
    """What a record says of the sampler that made a file."""
    return {name: number_or_text(written[name]) for name in OF_SAMPLER if name in written}


def _thresholds(text: str) -> tuple[float, ...]:
    found = [number_or_text(part) for part in text.split(",")]
    if not all(isinstance(each, (int, float)) and -1 <= each <= 1 for each in found):
        raise UsageError(f"--copy-threshold {text} is not a list of cosines")
    return tuple(float(each) for each in found)


def _extracted(directory: Path, device: torch.device) -> Callable[[str, Part], torch.Tensor]:
    from dlmctl.memorization.images.image_encoder import Extractor

    extract = Extractor(directory, device)
    return lambda name, part: extract(part.images)


def _read_features(text: str, heldout: bool) -> Callable[[str, Part], torch.Tensor]:
    from dlmctl.distill.image_sets import read_images

    files = text.split(",")
    names = ["samples", "train", *(["heldout"] if heldout else [])]
    if len(files) != len(names):
        raise UsageError(f"--features takes {len(names)} files here: {','.join(names).upper()}")
    held = dict(zip(names, files, strict=True))

    def features(name: str, part: Part) -> torch.Tensor:
        rows = read_images(held[name])
        if rows.dim() != 2 or len(rows) != part.read:
            raise DataError(
                f"{held[name]} is {list(rows.shape)}: of --{name} there have to be features "
                f"[{part.read}, F]"
            )
        return rows[part.places]

    return features


def _table(found: Parts, result: Result) -> None:
    """Figures with their intervals, a line each, and what is of both sets below."""
    columns = {
        "figure": "figure",
        **{name or "train": name or "train" for name in found.references},
    }
    lines = []
    for figure in result.figures:
        line = {"figure": figure.name}
        for number, name in enumerate(list(columns)[1:]):
            low_high = figure.intervals[number] if figure.intervals else None
            line[name] = _cell(figure.values[number], low_high)
        lines.append(line)
    for name, value in result.more.items():
        if value is not None and not name.endswith("_interval"):
            line = {"figure": name, "train": _cell(value, result.more.get(f"{name}_interval"))}
            lines.append(line)
    print_table(lines, {name: heading.strip("_") for name, heading in columns.items()})


def _cell(value: Any, interval: tuple[float, float] | None) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text + (f" ({interval[0]:.3g} – {interval[1]:.3g})" if interval else "")
