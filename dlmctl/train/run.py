"""A training run of a language model: policy, frozen reference, optimizer, counters and directory.

`open_run` begins a run, or resumes the one in the directory. With an adapter the reference is the
base model; with full weights it is a second copy of the model that the run began with, loaded when
it is first needed.

A checkpoint is an ordinary Hugging Face directory, or a peft adapter, with three more files: the
model card, and counters and tensors of `RunDirectory`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlmctl.models.adapters import merged
from dlmctl.models.allocator import release_cached_memory
from dlmctl.models.compiled import compiled_layers
from dlmctl.models.loading import (
    checkpoint_revision,
    fixed_name,
    load_base,
    load_policy,
    run_of,
)
from dlmctl.models.policy import Policy
from dlmctl.models.quantization import quantization_of
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.compute import Quantization, check_adapted
from dlmctl.settings.models import Prompting
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.averages import WEIGHTS, WeightAverage
from dlmctl.train.card import last_metrics, write_card
from dlmctl.train.distributed import broadcast, is_first, run_on_first, world_size
from dlmctl.train.evaluation import Evaluations
from dlmctl.train.lora import (
    adapter_off,
    adapter_settings,
    add_adapter,
    has_adapter,
    set_adapter_trainable,
)
from dlmctl.train.optimizer import (
    apply_step,
    learning_rate,
    make_optimizer,
    method_of,
    optimizer_state,
    restore_optimizer,
    trained_parameters,
)
from dlmctl.train.policy_card import policy_card
from dlmctl.train.precision import training_precision
from dlmctl.train.run_directory import SAMPLES, TENSORS, Progress, RunDirectory, forget_steps
from dlmctl.train.sharding import check_trainable, gathered, outline, shard, to_first


class Run:
    """State that must stay consistent: policy, optimizer, counters and their directory."""

    def __init__(
        self,
        directory: RunDirectory[Progress],
        policy: Policy,
        progress: Progress,
        optimization: Optimizer,
        compute_dtype: torch.dtype,
        form: nn.Module | None = None,
        compiled: bool = False,
    ) -> None:
        self.directory = directory
        self.policy = policy
        self.progress = progress
        self.optimization = optimization
        self.compute_dtype = compute_dtype
        self.parameters: dict[str, nn.Parameter] = trained_parameters(policy.model)
        self.optimizer = make_optimizer(self.parameters.values(), optimization)
        decay = optimization.ema
        self.average = WeightAverage(self.parameters, decay) if decay else None
        self.saved_step = progress.step
        self.logged_step = progress.step
        """The newest step whose metrics are in metrics.jsonl."""
        self.passed = 0
        """Records of the input that were skipped because the run had been trained on them."""
        self.revisions = [policy.revision]
        """Hashes of the weights that this process published, the newest last."""
        self._reference: Policy | None = None
        self.keep_samples: Callable[[Sequence[Sequence[Record]], int, int | None], None] | None
        self.keep_samples = None
        """Is offered the groups of each step, its number, and that of its round."""
        self.evaluations: Evaluations | None = None
        """Of its checkpoints on held-out prompts."""
        self.about: dict[str, Any] = {}
        """Options of the training for the card of a checkpoint, by name."""
        self._form = form
        """Outline of a model that is spread over several ranks."""
        self._compiled = compiled

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Within the block matrix products run in the compute dtype, and layers compiled if the
        run is to be."""
        policy, plain = self.policy, contextlib.nullcontext()
        layers = compiled_layers(policy.body, cached=False) if self._compiled else plain
        with training_precision(policy, self.compute_dtype), layers:
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[Policy]:
        """The frozen reference: the policy with its adapter off, or a second model."""
        if has_adapter(self.policy):
            with adapter_off(self.policy):
                yield self.policy
            return
        if self._reference is None:
            # Scored under the same autocast as the policy, so that equal weights score equal.
            self._reference = merged(
                load_policy(self.progress.reference, str(self.policy.device), "float32")
            )
            if self._reference.revision != self.progress.reference_revision:
                raise DataError(
                    f"{self.progress.reference} has other weights than when this run began; put "
                    "them back, or begin a new run"
                )
            if self._form is not None:
                shard(self._reference, self.compute_dtype)
        yield self._reference

    def step(self) -> dict[str, Any]:
        """Apply the accumulated gradient and count it; returns the metrics of the step."""
        given = self.optimization
        schedule = (given.rate, given.warmup, given.schedule, given.total_steps)
        rate = learning_rate(self.progress.step, *schedule)
        norm, applied = apply_step(self.optimizer, self.parameters.values(), rate, given.max_norm)
        self.progress.step += 1
        self.progress.skipped += not applied
        if applied:
            # No longer the weights that records or files know by the old revision.
            base = self.policy.revision.split("+")[0]
            revision = f"{base}+{self.progress.step}"
            self.policy = dataclasses.replace(self.policy, revision=revision)
            if self.average is not None:
                self.average.update(self.progress.step)
        return {"grad_norm": norm, "lr": rate, "applied": applied}

    def evaluate(self, last: bool = False) -> tuple[dict[str, Any] | None, str | None]:
        """Evaluate the newest checkpoint, or the model of the beginning, if its turn has come.

        Every rank calls this, and they leave it together.

        Args:
            last: no checkpoint follows.

        Returns:
            The record of the evaluation, and why training is to end, each None if there is none.

        Raises:
            DataError: the evaluation failed.
            RankError: it did, on the other ranks.
        """
        evaluations, step = self.evaluations, self.saved_step
        if evaluations is None:
            return None, None
        release_cached_memory(self.policy.device)
        record = run_on_first(lambda: evaluations.at(step, last))
        return record, run_on_first(evaluations.verdict)

    def recorded(self) -> dict[str, Any]:
        """Options of the training, by name."""
        return {**self.about, **dataclasses.asdict(self.optimization)}

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return self.directory.standing(self.progress.step)

    def whole_policy(self) -> Policy:
        """The policy; if it is spread over several ranks, with all its weights on the first."""
        return self.policy if self._form is None else gathered(self.policy, self._form)

    def untrained(self, records: Iterator[Record]) -> Iterator[Record] | None:
        """The records after those that the run has trained on, which come first; None: no more."""
        sound = 0
        while sound < self.progress.completions:
            record = next(records, None)
            if record is None:
                break
            sound += "error" not in record
            self.passed += 1
        if sound:
            print(f"dlmctl: {sound} records were trained on already", file=sys.stderr)
        first = next(records, None)
        if first is not None or not sound:
            return chain([] if first is None else [first], records)
        print(f"dlmctl: {self.directory} is at the end of its input", file=sys.stderr)
        return None

    def save(self, keep: int) -> None:
        """Publish the newest checkpoint, and remove all but the last `keep`.

        Every rank calls this, and they leave it together.

        Raises:
            CannotCreateError: the directory cannot be made.
            CannotWriteError: writing failed; the previous checkpoint is whole.
        """
        self.saved_step = self.progress.step
        moments = optimizer_state(self.optimizer, self.parameters)
        tensors = {name: to_first(value) for name, value in moments.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.policy.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.policy.device)
        unaveraged: dict[str, Tensor] = {}
        saved = self.average.in_place() if self.average else contextlib.nullcontext(unaveraged)
        with saved as weights:
            tensors |= {name: to_first(value) for name, value in weights.items()}
            revision = self._publish(self.whole_policy(), tensors, keep)
        self.policy = dataclasses.replace(self.policy, revision=revision)
        self.revisions.append(revision)

    def _publish(self, whole: Policy, tensors: Mapping[str, Tensor], keep: int) -> str:
        """Write a checkpoint, on the first rank; returns its revision on all."""
        revision = ""
        if is_first():
            settings = self.recorded()
            metrics = last_metrics(self.directory.metrics, step=self.progress.step)

            def fill(directory: Path) -> None:
                save_policy(whole, directory)
                save_file(dict(tensors), directory / TENSORS)
                # After save_policy, since peft writes a card too.
                write_card(directory, policy_card(whole, self.progress, settings, metrics))

            checkpoint = self.directory.save(self.progress.step, self.progress, fill, keep)
            revision = checkpoint_revision(checkpoint, self.progress.reference_revision)
        return broadcast(revision)


def open_run(
    directory: Path,
    model: str | None,
    algo: str,
    optimization: Optimizer,
    adapter: Adapter,
    device: str,
    dtype: str,
    gradient_checkpointing: bool,
    seed: int,
    otherwise: str = "builtin:puzzles",
    prompting: Prompting | None = None,
    quantize: Quantization | None = None,
    compiled: bool = False,
) -> Run:
    """Begin a run in `directory`, or resume the one that is there.

    A model with an adapter is trained with the adapter merged into its weights, which are then the
    reference. Of several ranks each loads the whole model, and keeps its share of it.

    Args:
        model: what to begin from, as the user names it; None: from `otherwise`.
        quantize: format of the weights below a new adapter; None: their own, or that of the run
            that is resumed.
        compiled: layers go through torch.compile.

    Raises:
        UsageError: the run in the directory trains by another algorithm or optimizer, from another
            model, format or other parts of it; several ranks cannot train the model, and none of
            several compiles it; or the dtype is float16.
        CannotCreateError: another kind of run is in the directory.
        MissingInputError: the model is not there.
        TryAgainError: another process trains in the directory.
        RankError: one of these, on the other ranks.
    """

    def check(progress: Progress | None) -> None:
        if progress is None:
            home.check_no_results()
            return
        if progress.algo != algo:
            raise UsageError(
                f"{directory} is a run of --algo {progress.algo}, not {algo}: choose another -o, "
                f"or begin from it with --model {directory}"
            )
        if model is None:
            return
        named = run_of(fixed_name(model))
        # It may name a checkpoint of this run, too.
        if named != run_of(progress.reference) and named[0] != directory.resolve():
            raise UsageError(
                f"{directory} began with {progress.reference}, not with {model}: leave --model out "
                "to resume it, or choose another -o to begin anew"
            )

    if dtype == "float16":
        raise UsageError(
            "--dtype float16: gradients below 6e-8 would vanish in training; give --dtype "
            "bfloat16, or float32 for a GPU without it"
        )
    if compiled and world_size() > 1:
        raise UsageError("--compile is for one process, and there are several: leave it out")
    home = RunDirectory(directory, Progress)
    progress, checkpoint = home.open(check), home.checkpoint
    torch.manual_seed(seed)  # the first values of an adapter, and its dropout
    compute = torch.float32
    if checkpoint is None or progress is None:
        precision = "float32" if adapter.rank == 0 else dtype
        check_adapted(quantize, adapter.rank)
        policy = load_base(fixed_name(model or otherwise), device, precision, prompting, quantize)
        progress = Progress(algo, policy.name, policy.revision)
        if adapter.rank:
            policy = add_adapter(policy, adapter)
    else:
        full = not (checkpoint / "adapter_config.json").exists()
        below = _quantization(quantize, progress, directory)
        precision = "float32" if full else dtype
        policy = load_policy(str(checkpoint), device, precision, prompting, below)
        _check_adapter(adapter, policy, directory)
        if has_adapter(policy):
            set_adapter_trainable(policy)
    if dtype != "auto":
        compute = getattr(torch, dtype)
    elif policy.device.type == "cuda":
        compute = torch.bfloat16
    if gradient_checkpointing:
        checkpoint_activations(policy.core)
    form = None
    if world_size() > 1:
        check_trainable(policy, optimization.optimizer)
        form = outline(policy.model)
        shard(policy, compute)
    run = Run(home, policy, progress, optimization, compute, form, compiled)
    if checkpoint is not None:
        tensors = load_file(checkpoint / TENSORS)
        if (method := method_of(tensors)) not in (None, optimization.optimizer):
            raise UsageError(
                f"{directory} has the moments of --optimizer {method}: give it to resume the run, "
                "or choose another -o"
            )
        if any(name.startswith(WEIGHTS) for name in tensors):
            if run.average is None:
                raise UsageError(
                    f"{directory} averages its weights: give --ema to resume the run, or choose "
                    "another -o"
                )
            run.average.restore(tensors)
        restore_optimizer(run.optimizer, run.parameters, tensors)
        restore_random(tensors, policy.device)
    if is_first():
        for file in (home.metrics, directory / SAMPLES):
            forget_steps(file, progress.step)
    return run


def restore_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators of the CPU and of the run's device, which drop out, where they were."""
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)


def _quantization(
    wanted: Quantization | None, progress: Progress, directory: Path
) -> Quantization | None:
    """The format of the weights below the adapter of a run; refuses another."""
    has = quantization_of(progress.reference_revision)
    if wanted not in (None, has):
        trains = f"over weights in {has}" if has else "weights that are not quantized, or over such"
        raise UsageError(
            f"{directory} trains {trains}: leave --quantize out to resume it, or choose another -o"
        )
    return has


def _check_adapter(wanted: Adapter, policy: Policy, directory: Path) -> None:
    """Refuse to resume a run with an adapter that it does not have."""
    if wanted.rank == 0:
        return
    has = adapter_settings(policy)
    if has is None:
        raise UsageError(
            f"{directory} trains all weights, not an adapter: leave --lora-rank out to resume it, "
            f"or begin from it with --model {directory} and another -o"
        )
    if has != wanted:
        raise UsageError(
            f"{directory} trains an adapter of rank {has.rank}, alpha {has.alpha:g} and dropout "
            f"{has.dropout:g}: give --lora-rank, --lora-alpha and --lora-dropout as it has them, "
            "or choose another -o"
        )
