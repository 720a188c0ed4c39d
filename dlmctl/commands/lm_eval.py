"""`dlmctl lm-eval`: options and wiring."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from dlmctl.commands.progress import counted
from dlmctl.records.errors import missing_package
from dlmctl.settings import Knob
from dlmctl.settings.streams import Quiet

PASSES_ON = True
"""Options that are not known here are arguments of the harness."""


def command(
    arguments: Annotated[
        list[str] | None,
        Knob(
            "Arguments of lm_eval, as --model_args, --tasks, --limit, --batch_size; -- --help "
            "lists them.",
            metavar="ARGUMENT",
            argument=True,
            shown_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model on the tasks of lm-evaluation-harness.

    Runs lm_eval with its own arguments and, unless --model is given, with --model dlmctl: any model
    that this package loads, with 32 sequences at a time unless --batch_size says otherwise.
    Generation is that of 'dlmctl rollout', cut at the first stop string; the log-likelihood of a
    masked diffusion model is the estimate of 'dlmctl score-elbo' under the same masks. The id of a
    document is its field id, or else TASK/NUMBER.

    --model_args takes pretrained=MODEL and, under the names that they have in 'dlmctl rollout' and
    'dlmctl score-elbo', gen_length, block_length, steps, top_p, top_k, cfg_scale, schedule,
    remasking, confidence_of, alg_temp, threshold, factor, cache, refresh, refresh_below, eos,
    early_stop, compile, masks (a law), masks_per_sample, seed and dtype. max_length=N is the most
    tokens of a context and its continuation; a longer context loses its beginning. greedy=false
    skips the completions that tell whether a continuation is the greedy one, which multiple-choice
    tasks do not use. gen_length applies to all tasks; without it, a task's own max_gen_toks, then
    the model's length.

    Examples:

    dlmctl lm-eval --model_args pretrained=runs/a,steps=64 --tasks gsm8k --batch_size 16

    dlmctl lm-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Base,masks_per_sample=128,greedy=false
    --tasks arc_challenge
    """
    # The harness's own progress bars: none, or one line a minute in a log.
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")
    elif not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")
    try:
        import lm_eval.__main__ as harness
    except ImportError as error:
        package = (error.name or "lm_eval").split(".")[0].replace("_", "-")
        raise missing_package(package, "eval", "lm-eval") from None
    from dlmctl.bench.lm_eval import HarnessModel  # registers it

    HarnessModel.counted = staticmethod(
        lambda items, what, total: counted(items, what, quiet, total)
    )

    sys.argv = ["lm_eval", *completed(arguments or [])]
    harness.cli_evaluate()


def completed(arguments: list[str]) -> list[str]:
    """The harness's arguments, with our model and an automatic batch size unless they are given."""
    named = {text.split("=")[0] for text in arguments}
    first = arguments[0] if arguments else ""
    if first in ("ls", "validate", "-h", "--help") or named & {"--model", "-M", "--config", "-C"}:
        return arguments
    batch = [] if named & {"--batch_size", "-b"} else ["--batch_size", "auto"]
    start = 1 if first == "run" else 0
    return [*arguments[:start], "--model", "dlmctl", *batch, *arguments[start:]]
