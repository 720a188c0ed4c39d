"""`dlmctl bench update`: options and wiring."""

from __future__ import annotations

from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.settings.bench import BenchModel, GradientStep
from dlmctl.settings.compute import Device
from dlmctl.settings.optimizer import Adapter
from dlmctl.settings.parsing import whole_numbers
from dlmctl.settings.streams import Json, Quiet

COLUMNS = [
    "path", "batch_size", "seconds", "ratio", "peak_memory_mb", "memory_ratio", "difference",
]  # fmt: skip


def command(
    model: BenchModel = "random:100m",
    step: GradientStep = GradientStep(),
    device: Device = Device(),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare one RSPO gradient with the plain implementation: seconds and peak memory.

    The work is that of a step of 'dlmctl update' up to the optimizer: scores under policy and
    reference, then the gradient. The plain implementation computes the logits of every position.
    Writes for each: seconds; ratio to the first row; peak memory in megabytes, on top of the
    weights, and its ratio; difference of the gradients, relative to their norm.

    Examples:

    dlmctl bench update --gen-length 512 -k 4

    dlmctl bench update -m random:8b --lora-rank 128 -n 6
    """
    from dlmctl.bench.shapes import bench_policy
    from dlmctl.bench.update import compare_gradients
    from dlmctl.train.activations import checkpoint_activations
    from dlmctl.train.lora import add_adapter

    sizes = whole_numbers("--batch-size", step.batch_sizes)
    policy, reference = bench_policy(model, device.device, device.dtype), None
    if step.rank:
        policy = add_adapter(policy, Adapter(step.rank))
    else:
        reference = bench_policy(model, device.device, device.dtype)
    if step.gradient_checkpointing:
        checkpoint_activations(policy.core)
    rows = compare_gradients(policy, reference, step, sizes)
    write_rows(counted(rows, "rows", quiet, 1 + len(sizes)), COLUMNS, json)
