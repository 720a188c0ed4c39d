"""`dlmctl bench gpu`: options and wiring."""

from __future__ import annotations

from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.settings.bench import BenchModel, DeviceWork
from dlmctl.settings.compute import Device
from dlmctl.settings.streams import Json, Quiet

COLUMNS = [
    "what", "path", "temperature", "gradient_checkpointing", "batch_size", "value", "unit",
    "tflops", "peak_memory_mb", "left_out",
]  # fmt: skip


def command(
    model: BenchModel = "random:8b",
    work: DeviceWork = DeviceWork(),
    device: Device = Device(),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure what a device does: sampling, scoring, training, autoencoders, neighbours.

    For a model of 8 billion parameters on an H100 it is meant to take less than ten minutes. Parts,
    in this order:

    rollout: the last block of completions, sampled exactly, with --cache dual, and with --threshold
    too, greedily and at the temperature of 'dlmctl rollout', for each --batch-size. How many tokens
    a threshold decides at once depends on how sure the model is, and random weights say nothing
    about that. compile: exact sampling with --compile, greedily. scoring: ELBO of -n completions.
    update: one RSPO gradient of an adapter, with and without --gradient-checkpointing. sae: steps
    of a sparse autoencoder. neighbours: the two nearest of many vectors.

    Writes a record for each: what; value and unit; settings; seconds; tflops, 10^12 operations a
    second; peak memory in megabytes, on top of the weights; model and device. What does not fit
    into memory or into --seconds has no value, and left_out says why. 'dlmctl plan --measured'
    reads the records.

    Examples:

    dlmctl bench gpu > measured.jsonl

    dlmctl bench gpu -m random:100m --parts rollout,update --batch-size 8 --seconds 300
    """
    from dlmctl.bench.gpu import device_figures

    write_rows(counted(device_figures(model, work, device), "measurements", quiet), COLUMNS, json)
