"""`dlmctl rollout`: the stage that samples completions."""

from __future__ import annotations

from typing import Annotated

from dlmctl.commands.progress import Total, counted, times
from dlmctl.commands.prompt_source import prompt_records, prompt_shard, prompt_total
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.settings import Knob
from dlmctl.settings.compute import Model, QuantizedCompute, Seed
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.order import GuidingSaes
from dlmctl.settings.rollout import Corrupted, Engines, Loop, PromptSource
from dlmctl.settings.sampler import SAMPLED, Sampler
from dlmctl.settings.steering import Steering
from dlmctl.settings.streams import Files, Stage


def command(
    files: Files = None,
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    samples: Annotated[int, Knob("Completions for each prompt.", "-n", "--samples", minimum=1)] = 8,
    sampler: Sampler = SAMPLED,
    sae: GuidingSaes = None,
    steering: Steering = Steering(),
    source: PromptSource = PromptSource(),
    loop: Loop = Loop(),
    engines: Engines = Engines(),
    images: Corrupted = Corrupted(),
    seed: Seed = 0,
    compute: QuantizedCompute = QuantizedCompute(batch_size=64),
    stage: Stage = Stage(),
) -> None:
    """Sample completions from a model.

    Reads records with `prompt` or `messages` (or `tokens.prompt`, taken as it is) and writes one
    record for each completion; the samples of a prompt follow one another. Masked diffusion models
    are decoded block by block as in LLaDA, or as their authors do it (Dream); autoregressive ones
    from left to right.

    With no FILE and no piped input, prompts come from --task.

    --remasking sae is an experiment of this package: the confidence of a masked position is that of
    low_confidence times the Jaccard similarity of its active features to those of the step before
    (unchanged in the first step), averaged over --sae.

    --steer changes what the model computes: the output of the SAE's layer becomes H + AMPLITUDE m
    W_dec[FEATURE], where m is the largest entry of the code of H, or |H| with --steer-unit norm.
    All positions of a pass are steered; with --cache a pass has the block alone, or the block and
    what follows it. The field `rollout.push` is the mean of |push| / |H| over the steered positions
    of all passes. For the same completions unsteered, leave --steer out or write =0: the noise is
    the same.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl update --algo rspo

    dlmctl rollout -m GSAI-ML/LLaDA-8B-Instruct --gen-length 256 --steps 128 -n 6 prompts.jsonl

    dlmctl rollout --follow runs/a --rounds 200 | dlmctl verify | dlmctl update -o runs/a

    dlmctl rollout -m runs/a --steer saes/layer2-k8-mask:17=2 --steer-scope update prompts.jsonl

    dlmctl rollout -m runs/a --shard 3/8 -o samples-3.jsonl prompts.jsonl

    dlmctl rollout -m Qwen/Qwen3-8B --engine http://gpu1:30000,http://gpu2:30000 prompts.jsonl
    """
    from dlmctl.diffusion.callback import SeveralCallbacks
    from dlmctl.diffusion.corrupted import with_corrupted_images
    from dlmctl.diffusion.follow import follow_run, rounds_done
    from dlmctl.diffusion.rollout import batch_begins, made_by, rollout
    from dlmctl.diffusion.sampling import configured
    from dlmctl.diffusion.served import ServedSampler
    from dlmctl.engines.weightless_policy import served_policy
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.order.tracking import FeatureTracker, check_trackable, read_tracked_saes
    from dlmctl.sae.steering.steered_policy import SteeredPolicy

    files, task = files or [], source.task
    if files and task is not None:
        raise UsageError("prompts come from FILE or from --task, not from both")
    model = reading.name(model)
    shard = prompt_shard(stage.shard, files, task)
    if (sampler.remasking == "sae") != bool(sae):
        raise UsageError("--remasking sae and --sae SAE go together: give both, or neither")
    if loop.follow is not None:
        _check_loop(
            shard=shard, steer=steering.steer, corrupt=images.corrupt, sae=sae, resume=stage.resume
        )
    served = None
    if engines.urls:
        _check_engine(
            steer=steering.steer, sae=sae, corrupt=images.corrupt, quantize=compute.quantize
        )
        served = ServedSampler(engines, sampler, follows=loop.follow is not None)
    partial = Resume(stage.output, stage.resume)
    if partial.done:
        return
    if loop.follow is not None:
        first = rounds_done(loop.follow)
        per_round = source.prompts * samples
        endless = prompt_records(files, task, None, seed, stage.on_error, repeat=True)
        records = follow_run(
            endless, loop, model, sampler, samples, source.prompts, seed, compute, stage.on_error,
            prompting, served,
        )  # fmt: skip
        shown = counted(records, "samples", stage.quiet, loop.rounds * per_round, first * per_round)
        write_records(shown, stage.output)
        return
    if served is not None:
        policy = served_policy(model, prompting)
    else:
        policy = load_policy(model, compute.device, compute.dtype, prompting, compute.quantize)
    if images.corrupt is not None:
        policy = with_corrupted_images(policy, images.corrupt, images.corrupt_prob, seed)
    config = configured(policy, sampler)
    rule = Rule(
        frozenset({"sample", "completion", "tokens", "rollout"}),
        samples,
        skips=stage.on_error == "skip",
        begins=batch_begins(policy, config, compute.batch_size, served is not None),
        made_by={"rollout": made_by(policy, config, samples, seed)},
    )
    total: Total = times(prompt_total(files, task, source.prompts, shard), samples)
    prompts = prompt_records(files, task, source.prompts, seed, stage.on_error, False, shard)
    tracker = None
    if sae:
        check_trackable(policy, config, "--remasking sae")
        tracker = FeatureTracker(policy, read_tracked_saes(sae, policy))
    steered = SteeredPolicy(policy, config, steering) if steering.steer else None
    callbacks = [part for part in (tracker, steered) if part is not None]
    records = rollout(
        partial.rest(prompts, rule), policy, config, samples, seed, compute.batch_size,
        stage.on_error, callback=SeveralCallbacks(callbacks) if callbacks else None, served=served,
    )  # fmt: skip
    if tracker is not None:
        records = tracker.around(records)
    if steered is not None:
        records = steered.around(records)
    shown = counted(records, "samples", stage.quiet, total, partial.lines)
    write_records(shown, stage.output, partial)


def _check_loop(**given: object) -> None:
    """Raise UsageError if an option is given that a training loop cannot have."""
    for option, value in given.items():
        if value:
            raise UsageError(
                f"--{option} and --follow do not go together: {NOT_IN_A_LOOP[option]}; leave one "
                "out"
            )


def _check_engine(**given: object) -> None:
    """Raise UsageError if an option is given that inference servers cannot have."""
    for option, value in given.items():
        if value:
            raise UsageError(
                f"--{option} and --engine do not go together: {NOT_BY_AN_ENGINE[option]}; leave "
                "one out"
            )


NOT_BY_AN_ENGINE = {
    "steer": "a server does not steer",
    "sae": "a server does not give its activations",
    "corrupt": "servers sample from language models alone",
    "quantize": "a server has its weights in a format of its own",
}
"""Options that do not go with --engine, and why."""

NOT_IN_A_LOOP = {
    "shard": "each round of a run is sampled by one process",
    "steer": "a steered completion is no sample of the weights that are trained",
    "corrupt": "the run is trained with its images",
    "sae": "an autoencoder belongs to weights that do not change",
    "resume": "a run resumes by itself",
}
"""Options that do not go with --follow, and why."""
