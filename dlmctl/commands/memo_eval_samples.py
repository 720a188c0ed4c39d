"""`dlmctl memo-eval samples`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from dlmctl.commands.labels import Labels, label_fields, labelled, number_or_text
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import DeviceName
from dlmctl.settings.images import ImageReading
from dlmctl.settings.memorization import (
    Bootstrap,
    Encoders,
    Gallery,
    ImageSources,
    SampleStudy,
)
from dlmctl.settings.streams import Json, Output, Quiet

if TYPE_CHECKING:
    import torch

    from dlmctl.memorization.images.compared_sets import ImageSets
    from dlmctl.memorization.images.sample_study import StudyResult

OF_SAMPLER = ("model", "step", "steps", "evaluations")
"""Metadata that 'distill sample' writes into a file, which the record of 'memo-eval' repeats."""


def command(
    sources: ImageSources,
    reading: ImageReading = ImageReading(),
    study: SampleStudy = SampleStudy(),
    encoders: Encoders = Encoders(),
    bootstrap: Bootstrap = Bootstrap(),
    rows: Annotated[
        str | None,
        Knob(
            "Write a record for each sample: id, nn, d1, d2, ratio, memorized.",
            "--rows",
            metavar="FILE",
            shown_default="none",
        ),
    ] = None,
    gallery: Gallery = Gallery(),
    labels: Labels = None,
    output: Output = "-",
    json: Json = False,
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure how much of a training set samples repeat, and how good they are.

    The ratio test: a sample is memorized if its nearest training image is less than a third as far
    away as the second nearest (L2 of pixels). It is complemented by cosines of features (of SSCD,
    with --sscd), and by quality: precision, recall, density, coverage, MMD, KID and Fréchet
    distance. Every figure is taken against the held-out set too: what samples have in common with
    images that the model never saw is not memorization.

    Writes a record for each set of samples: f_mem is the share that is memorized, f_mem_interval a
    bootstrap interval, heldout_f_mem the same against the held-out set, f_mem_excess the
    difference; ratio and d1 are means; sim, sim_p95 and sim_max are of the largest cosines; lpips
    is the perceptual distance to the image that is nearest by pixels, with its 5th percentile
    lpips_p05 (--lpips); mmd2_gap is the MMD to the training set less the MMD to held-out images,
    with a one-sided p from exchanging them; fd is the Fréchet distance in the space of quality, and
    fd_se its error over samples and references, up to 512 dimensions; fd_train_heldout is the
    distance from the training set to held-out images, which no sampler can be expected to beat. fid
    and kid are in Inception's features (--inception); kid_std is the standard deviation over its
    subsets. A share of exactly 0 or 1 has an interval of width 0: it may be wrong by up to 3 / N.
    Weights are named by path and hash. For files by 'distill sample' the record also has model,
    step (of training), steps (of the sampler) and evaluations.

    Examples:

    dlmctl memo-eval --samples s.safetensors --train builtin:digits#0:128

    dlmctl memo-eval --samples s.safetensors --train builtin:digits#0:128 --heldout
    builtin:digits#128: --gallery copies.png --rows rows.jsonl

    dlmctl memo-eval --samples s.safetensors --train cifar.safetensors --heldout test.safetensors
    --inception pt_inception-2015-12-05-6726825d.pth --sscd sscd_disc_mixup.torchvision.pt

    dlmctl memo-eval --samples s.safetensors --train d.safetensors --set role=teacher --set n=128
    """
    fields = label_fields(labels)
    from dlmctl.distill.image_sets import images_hash, origin_note, read_about, read_images
    from dlmctl.memorization.images.compared_sets import compared_sets
    from dlmctl.memorization.images.controls import gaussian_control
    from dlmctl.memorization.images.features import SetFeatures
    from dlmctl.memorization.images.gallery import check_drawable, picture
    from dlmctl.memorization.images.sample_study import sample_rows, study_samples, summary
    from dlmctl.models.loading import resolve_device

    where = resolve_device(device)
    several = len(sources.samples) > 1 or study.control is not None
    if several and (rows or gallery.gallery or encoders.features):
        raise UsageError("--rows, --gallery and --features are for one --samples, and no --control")
    if encoders.inception and not study.quality:
        raise UsageError("--inception is for figures of quality, which --no-quality leaves out")
    ranges: dict[tuple[float, float], str] = {}
    train = read_images(sources.train, reading, ranges)
    heldout = read_images(sources.heldout, reading, ranges) if sources.heldout else None
    features = SetFeatures(encoders, where, heldout is not None)
    identity, printed = images_hash(train), set[str]()

    def say(notes: list[str]) -> None:
        for note in notes:
            if note not in printed:
                print(f"dlmctl: {note}", file=sys.stderr)
        printed.update(notes)

    def studied(
        samples: torch.Tensor, written: dict[str, Any]
    ) -> tuple[dict[str, Any], ImageSets, StudyResult]:
        sets = compared_sets(samples, train, heldout, study)
        if gallery.gallery:
            check_drawable(sets.samples.images)  # before anything takes long
        sets = features.added(sets)
        say(sets.notes)
        result = study_samples(sets, study, bootstrap, where, features.lpips)
        row = labelled({**written, **fields}, {**summary(sets, result, study), **features.about})
        return row, sets, result

    def read(name: str) -> tuple[torch.Tensor, dict[str, Any]]:
        samples, written = read_images(name, reading, ranges), read_about(name)
        if other := origin_note(name, identity):
            say([other])
        of_sampler = {key: number_or_text(written[key]) for key in OF_SAMPLER if key in written}
        return samples, of_sampler

    def all_studied() -> Iterator[dict[str, Any]]:
        for name in sources.samples:
            samples, written = read(name)
            yield studied(samples, written)[0]
        if study.control:
            drawn = gaussian_control(train, len(samples), bootstrap.seed)
            yield studied(drawn, {"control": study.control})[0]

    if several:
        total = len(sources.samples) + (study.control is not None)
        write_records(counted(all_studied(), "sets", quiet, total), output)
        return
    row, sets, result = studied(*read(sources.samples[0]))
    if rows:
        of_samples = sample_rows(sets, result, study.threshold)
        write_records(counted(of_samples, "samples", quiet, len(sets.samples.images)), rows)
    if gallery.gallery:
        write_file(gallery.gallery, picture(sets, result, study.threshold, gallery))
    if json or output != "-" or not sys.stdout.isatty():
        write_records([row], output)
    else:
        _table(sets, result)


def _table(sets: ImageSets, result: StudyResult) -> None:
    """A line for each figure, with its intervals, then the figures of both sets at once."""
    names = [name or "train" for name in sets.references]
    lines = []
    for figure in result.figures:
        line = {"figure": figure.name}
        for number, name in enumerate(names):
            interval = figure.intervals[number] if figure.intervals else None
            error = figure.errors[number] if figure.errors else None
            line[name] = _cell(figure.values[number], interval, error)
        lines.append(line)
    for name, value in result.joint.items():
        if value is not None and not name.endswith("_interval"):
            interval = result.joint.get(f"{name}_interval")
            lines.append({"figure": name, "train": _cell(value, interval)})
    print_table(lines, {name: name.strip("_") for name in ("figure", *names)})


def _cell(value: Any, interval: tuple[float, float] | None, error: float | None = None) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text += "" if error is None else f" ± {error:.2g}"
    return text + (f" ({interval[0]:.3g} – {interval[1]:.3g})" if interval else "")
