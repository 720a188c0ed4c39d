"""`dlmctl update`: the stage that trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.commands.tracking import check_trackers, tracked
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.groups import group_size
from dlmctl.records.jsonl import OnError, Record, each, object_field
from dlmctl.records.locks import Lock, hold_run
from dlmctl.records.passes import read_passes
from dlmctl.settings.algorithms import RECIPES, Algorithm, check_kind
from dlmctl.settings.compute import QuantizedCompute, Seed
from dlmctl.settings.masks import Fill, Masks, Supervised
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.objective import Advantages, Algo, Constants
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.streams import Files, OnErrorOption, Passes, Quiet
from dlmctl.settings.training import (
    Evaluating,
    Learning,
    Log,
    OptionalModel,
    ResumeInput,
    RunOutput,
    Saving,
)


@on_every_rank
def command(
    files: Files = None,
    passes: Passes = Passes(),
    algo: Algo = "rspo",
    model: OptionalModel = None,
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    output: RunOutput = None,
    constants: Constants = Constants(),
    learning: Learning = Learning(),
    advantages: Advantages = Advantages(),
    masks: Masks = Masks(),
    supervised: Supervised = Supervised(),
    optimizer: Optimizer = Optimizer(),
    adapter: Adapter = Adapter(),
    saving: Saving = Saving(),
    evaluating: Evaluating = Evaluating(),
    log: Log = None,
    seed: Seed = 0,
    compute: QuantizedCompute = QuantizedCompute(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    resume: ResumeInput = False,
) -> None:
    """Train a model on the records and save a checkpoint.

    Takes one optimizer step for every --prompts-per-step groups and writes one metrics record for
    each to standard output and to RUN/metrics.jsonl. RUN/latest is a Hugging Face directory that
    every --model takes. The same command resumes the run; with --resume also the input.

    Rows with `prompt`, `chosen` and `rejected` (texts, or messages) are preferences, for --algo
    vrpo; no rewards are needed.

    What the records lack is computed: advantages from rewards, scores of policy and reference.
    Scores of 'dlmctl score-elbo' are used if they belong to these weights and masks. Advantages
    that 'dlmctl advantage' computed with another --baseline or --scale are refused.

    All but rspo, reinforce, wd1, spg, vrpo and sft use ratios to the weights that sampled the
    completions. These are found in the run itself (a copy stays in main memory while a round has
    further batches), in the reference, or in the model that the records name, if it still has these
    weights. For grpo, srpo and justgrpo with an autoregressive model, the log-probabilities that
    'dlmctl rollout' recorded are enough. Completions that do not name their model count as sampled
    from the weights before the step.

    On several GPUs, or CPUs, FSDP2 spreads weights, gradients and the optimizer's moments over the
    processes, and each computes its share of every step. Steps and files are those of one process,
    and a run can be resumed with more or fewer processes. --batch-size is that of each. Dropout is
    refused.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl update --algo rspo -o runs/a

    dlmctl init runs/new && dlmctl prompts sudoku -n 100000 --completions |
    dlmctl update --algo sft -m runs/new -o runs/base

    dlmctl update -o runs/c --patience 5 --eval 'dlmctl rollout test.jsonl | dlmctl verify'
    verified.jsonl

    dlmctl update --algo vrpo -m GSAI-ML/LLaDA-8B-Instruct --lora-rank 128 preferences.jsonl

    dlmctl update --algo grpo --loss-type dr_grpo --max-length 512 --clip-high 0.28 verified.jsonl

    torchrun --nproc-per-node 8 -m dlmctl update -m GSAI-ML/LLaDA-8B-Instruct -o runs/b
    verified.jsonl
    """
    from dlmctl.diffusion.annealing import check_annealed
    from dlmctl.diffusion.scoring import mask_plan
    from dlmctl.rl.advantage_stage import consistent
    from dlmctl.rl.advantages import Normalization
    from dlmctl.rl.batches import of_one_model
    from dlmctl.rl.kept_samples import KeptSamples
    from dlmctl.rl.objectives.table import make_objective
    from dlmctl.rl.policy_gradient import Batching
    from dlmctl.rl.supervised import with_completion_ids
    from dlmctl.rl.update import update_policy, update_supervised
    from dlmctl.train.distributed import run_on_first
    from dlmctl.train.evaluation import Evaluations
    from dlmctl.train.run import open_run

    # 1. Refuse what does not go together.
    check_trackers(log)
    _check_supervised(algo, supervised, learning, advantages)
    if optimizer.ema and algo != "sft":
        raise UsageError("--ema is for --algo sft: completions are sampled from checkpoints")
    if passes != Passes() and algo != "sft":
        raise UsageError("--epochs and --shuffle are for --algo sft: groups stay as they are")
    if learning.credit_cosine is not None and not RECIPES[algo].token_weights:
        raise UsageError(f"--credit-cosine is about token weights, which --algo {algo} has not")
    samples = saving.samples()
    if samples and algo == "sft":
        raise UsageError("--keep-samples is for completions that were sampled, not for --algo sft")
    levels, loss, recipe = supervised.levels, constants.of(algo), RECIPES[algo]
    normalization = Normalization.of(algo, advantages)
    inner, prompts = learning.inner or recipe.inner, advantages.prompts_per_step

    # 2. Open the run, once the first record is there.
    lines, stream = input_lines(files), _Stream(passes, seed, samples is not None)
    sampled_from, directory = run_on_first(
        lambda: stream.begin(algo, output, files, on_error, supervised.filling)
    )
    run = open_run(
        Path(directory),
        reading.of(model),
        algo,
        optimizer,
        adapter,
        compute.device,
        compute.dtype,
        learning.gradient_checkpointing,
        seed,
        sampled_from or "builtin:puzzles",
        prompting,
        compute.quantize,
        learning.compile,
    )
    check_kind(algo, run.policy.diffusion, run.policy.name)
    if supervised.anneal_attention is not None:
        check_annealed(run.policy)
    rest = run.untrained(stream.records) if resume else stream.records
    if rest is None:
        return
    if samples:
        run.keep_samples = KeptSamples(run.directory.path, *samples).offer
    if evaluating.eval is not None:
        # By its name alone it would have prompts of its own form.
        begin = run.progress.reference if prompting == Prompting() else None
        run.evaluations = Evaluations(evaluating, run.directory, algo, begin)
    if model is None and not run.progress.step:
        rest = of_one_model(rest, sampled_from)
    if stream.pairs:
        policy, fill = run.policy, supervised.filling
        rest = each(rest, lambda record: with_completion_ids(record, policy, fill))

    # 3. Train.
    if supervised.level and masks.law is None:
        masks = replace(masks, law="independent")
    plan = mask_plan(masks, seed, recipe, levels)
    run.about = {
        "seed": seed,
        "masks": plan.law,
        "masks per sample": plan.samples or "all",
        **({"steps per mask": plan.shrink} if plan.law == "trajectory" else {}),
        "prompt mask": plan.prompt_mask,
        "until eos": plan.until_eos,
        "prompts per step": prompts,
        **passes.recorded(),
        **{name: value for name, value in loss.items() if value is not None},
    }
    if algo == "sft":
        if supervised.anneal_attention is not None:
            run.about |= {"attention opened until step": supervised.anneal_attention}
        metrics = update_supervised(
            rest,
            run,
            plan,
            prompts,
            compute.batch_size,
            supervised.filling,
            saving.save_every,
            saving.keep,
            supervised.anneal_attention,
        )
    else:
        run.about |= {"inner steps": inner, **normalization.settings()}
        batching = Batching(
            plan,
            normalization,
            inner,
            recipe.drop_zero_adv if learning.drop_zero_adv is None else learning.drop_zero_adv,
            loss.get("residual_masks") == "independent",
        )
        metrics = update_policy(
            consistent(rest, normalization),
            run,
            make_objective(algo, **vars(constants)),
            batching,
            prompts,
            compute.batch_size,
            saving.save_every,
            saving.keep,
            learning.any_policy,
            learning.credit_cosine,
        )
    group = max(0, stream.group or 0)
    total = lines.times(passes.epochs * inner / (group * prompts)) if group else None
    begun = 0 if resume else run.progress.step

    def done() -> int:  # evaluations have records too, and are no steps
        return run.progress.step - begun

    with tracked(log, run.directory.path, run.recorded()):
        write_metrics(metrics, quiet, run.standing, total, done(), done)


class _Stream:
    """The input, which the first rank alone reads."""

    def __init__(self, passes: Passes, seed: int, keeps_samples: bool) -> None:
        self._passes, self._seed, self._keeps_samples = passes, seed, keeps_samples
        self.records: Iterator[Record] = iter(())
        self.group: int | None = None
        """Records of a prompt; None if the first one does not say."""
        self.pairs = False
        """Whether each is a row of preferences, and a group."""
        self._lock: Lock | None = None

    def begin(
        self,
        algo: Algorithm,
        output: Path | None,
        files: list[str] | None,
        on_error: OnError,
        fill: Fill | None,
    ) -> tuple[str | None, str]:
        """Read the first record: the model that it was sampled from, and the run's directory."""
        from dlmctl.rl.preferences import is_preference, preference_pairs
        from dlmctl.train.run_directory import next_run

        directory = output or next_run(algo)
        # Refused before the first record, which may be long in coming; kept until the run has it.
        self._lock = hold_run(directory) if directory.is_dir() else None
        self.records, first = _with_first(
            read_passes(
                files or [], on_error, self._passes.epochs, self._passes.shuffle, self._seed
            )
        )
        self.pairs = is_preference(first)
        if self.pairs and algo != "vrpo":
            raise UsageError(
                f"{first.where}: a row with 'chosen' and 'rejected' is a preference, for --algo "
                f"vrpo, not {algo}"
            )
        if self.pairs and self._keeps_samples:
            raise UsageError(f"--keep-samples is for completions that were sampled: {first.where}")
        if algo == "vrpo" and fill is not None and not self.pairs:
            raise UsageError(f"--fill-to is for texts: {first.where} has no 'chosen'")
        if self.pairs:
            self.records = preference_pairs(self.records, on_error)
        self.group = 1 if algo == "sft" or self.pairs else group_size(first)
        sampled_from = object_field(first, "rollout").get("model")
        if not isinstance(sampled_from, str | None):
            raise DataError("field 'rollout.model' is not the name of a model", first.where)
        print(f"dlmctl: writing {directory}", file=sys.stderr)
        return sampled_from, str(directory)


def _check_supervised(
    algo: Algorithm, supervised: Supervised, learning: Learning, advantages: Advantages
) -> None:
    """Raise UsageError for options of rewards with sft, or of sft with rewards."""
    if algo != "sft":
        if supervised.level:
            raise UsageError("--t is for --algo sft: other objectives need the whole bound")
        if supervised.fill_to is not None and algo != "vrpo":
            raise UsageError(
                f"--fill-to is for --algo sft and vrpo: the completions of {algo} are as sampled"
            )
        if supervised.anneal_attention is not None:
            raise UsageError("--anneal-attention is for --algo sft, which comes first")
        return
    rewarded = {
        "--inner": learning.inner,
        "--baseline": advantages.baseline,
        "--scale": advantages.scale,
        "--drop-zero-adv": learning.drop_zero_adv,
    }
    for option, value in rewarded.items():
        if value is not None:
            raise UsageError(f"{option} means nothing to --algo sft, which has no rewards")


def _with_first(records: Iterator[Record]) -> tuple[Iterator[Record], Record]:
    """The same records, and the first of them that is not an error from before `rollout`."""
    errors: list[Record] = []
    for record in records:
        if "error" not in record or "rollout" in record:
            return chain(errors, [record], records), record
        errors.append(record)
    raise UsageError("no records came in; nothing to train on")
