"""`dlmctl rollout`: options and wiring of the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    Model,
    OnErrorOption,
    Output,
    Quiet,
    ResumeOption,
    Seed,
    ShardOption,
)
from dlmctl.commands.progress import Total, counted, times
from dlmctl.commands.prompt_source import (
    Prompts,
    Task,
    prompt_records,
    prompt_shard,
    prompt_total,
)
from dlmctl.commands.sampling import (
    BlockLength,
    Cache,
    CfgScale,
    Compile,
    Corrupt,
    CorruptProb,
    EarlyStop,
    Eos,
    Factor,
    GenLength,
    Refresh,
    RefreshBelow,
    Remasking,
    Steps,
    Temperature,
    Threshold,
)
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.order import GuidingSaes
from dlmctl.settings.steering import Steering


def command(
    files: Files = None,
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=1, help="Completions for each prompt.")
    ] = 8,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.9,
    cfg_scale: CfgScale = 0.0,
    remasking: Remasking = "low_confidence",
    sae: GuidingSaes = None,
    threshold: Threshold = None,
    factor: Factor = None,
    cache: Cache = "none",
    refresh: Refresh = None,
    refresh_below: RefreshBelow = 0.0,
    eos: Eos = "normal",
    early_stop: EarlyStop = False,
    compile_model: Compile = False,
    steering: Steering = Steering(),
    task: Task = None,
    prompts: Prompts = 32,
    follow: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Training loop: before each round load the newest checkpoint of this run, which "
            "'dlmctl update -o RUN' at the end of the pipe writes.",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="With --follow: rounds in all; a run goes on where it was.")
    ] = 1,
    max_lag: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --follow: rounds that the weights may lag behind; 0 is strictly on-policy, "
            "1 samples a round while the one before is trained on.",
        ),
    ] = 0,
    corrupt: Corrupt = None,
    corrupt_prob: CorruptProb = 0.6,
    shard: ShardOption = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
    resume: ResumeOption = False,
) -> None:
    """Sample completions from a model.

    Reads records with `prompt` or `messages` (or `tokens.prompt`, taken as it is) and writes one
    record for each completion, the samples of a prompt as neighbours. Masked diffusion models are
    decoded block by block as in LLaDA, autoregressive ones from left to right.

    With no FILE and no piped input, prompts come from --task.

    --remasking sae is an experiment of this package: the confidence of a masked position is that of
    low_confidence times the Jaccard similarity of its active features with those of the step before
    (in the first step as it is), averaged over --sae.

    --steer changes what the model computes: the output of the SAE's layer becomes H + AMPLITUDE m
    W_dec[FEATURE], m the largest entry of the code of H. Steered are the positions of each pass,
    with --cache those of the block and what follows it. Leave --steer out, or write =0, for the
    same completions unsteered: the noise is the same.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl update --algo rspo

    dlmctl rollout -m GSAI-ML/LLaDA-8B-Instruct --gen-length 256 --steps 128 -n 6 prompts.jsonl

    dlmctl rollout --follow runs/a --rounds 200 | dlmctl verify | dlmctl update -o runs/a

    dlmctl rollout -m runs/a --steer saes/layer2-k8-mask:17=2 --steer-scope update prompts.jsonl

    dlmctl rollout -m runs/a --shard 3/8 -o samples-3.jsonl prompts.jsonl
    """
    from dlmctl.diffusion.corrupted import with_corrupted_images
    from dlmctl.diffusion.follow import follow_run, rounds_done
    from dlmctl.diffusion.rollout import batch_begins, made_by, rollout
    from dlmctl.diffusion.sampling import settings_for
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.order.tracking import FeatureTracker, check_trackable, read_tracked_saes
    from dlmctl.sae.steering.edit import SteeredPolicy

    if files and task is not None:
        raise UsageError("prompts come from FILE or from --task, not from both")
    model = reading.name(model)
    part = prompt_shard(shard, files or [], task)
    if follow is not None and part is not None:
        raise UsageError(
            "--shard and --follow do not go together: each round of a run is sampled by one "
            "process; leave one out"
        )
    given: dict[str, Any] = {
        "gen_length": gen_length,
        "block_length": block_length,
        "steps": steps,
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "remasking": remasking,
        "threshold": threshold,
        "factor": factor,
        "cache": cache,
        "refresh": refresh,
        "refresh_below": refresh_below,
        "eos": eos,
        "early_stop": early_stop,
        "compile": compile_model,
    }
    if follow is not None and steering.steer:
        raise UsageError(
            "--steer and --follow do not go together: a steered completion is no sample of the "
            "weights that are trained; leave one out"
        )
    if follow is not None and corrupt is not None:
        raise UsageError(
            "--corrupt and --follow do not go together: the run is trained with its images; leave "
            "one out"
        )
    if (remasking == "sae") != bool(sae):
        raise UsageError("--remasking sae and --sae SAE go together: give both, or neither")
    if follow is not None and sae:
        raise UsageError(
            "--sae and --follow do not go together: an autoencoder is of weights that stay as they "
            "are; leave one out"
        )
    if follow is not None and resume:
        raise UsageError("--follow goes on with its run by itself: leave --resume out")
    going = Resume(output, resume)
    if going.done:
        return
    total: Total = times(prompt_total(files or [], task, prompts, part), samples)
    done = 0
    if follow is not None:
        done, total = (n * prompts * samples for n in (rounds_done(follow), rounds))
        source = prompt_records(files or [], task, None, seed, on_error, repeat=True)
        records = follow_run(
            source,
            follow,
            model,
            lambda policy: settings_for(policy, **given),
            samples,
            prompts,
            rounds,
            max_lag,
            seed,
            batch_size,
            device,
            dtype,
            on_error,
            prompting,
        )
    else:
        policy = load_policy(model, device, dtype, prompting)
        if corrupt is not None:
            policy = with_corrupted_images(policy, corrupt, corrupt_prob, seed)
        source = prompt_records(files or [], task, prompts, seed, on_error, False, part)
        settings = settings_for(policy, **given)
        rule = Rule(
            frozenset({"sample", "completion", "tokens", "rollout"}),
            samples,
            skips=on_error == "skip",
            begins=batch_begins(policy, settings, batch_size),
            made_by={"rollout": made_by(policy, settings, samples, seed)},
        )
        source = going.rest(source, rule)
        watch = None
        if sae:
            check_trackable(policy, settings, "--remasking sae")
            watch = FeatureTracker(policy, read_tracked_saes(sae, policy))
        records = rollout(
            source, policy, settings, samples, seed, batch_size, on_error, callback=watch
        )
        if watch is not None:
            records = watch.around(records)
        if steering.steer:
            records = SteeredPolicy(policy, settings, steering).around(records)
    shown = counted(records, "samples", quiet, total, done or going.lines)
    write_records(shown, output, None if follow else going)
