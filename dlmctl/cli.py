"""The command line: a table from subcommand to module, imported when it is called.

`dlmctl --help` reads the table alone, so that it starts at once; torch is imported by the stages
that need it and by nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from dlmctl import __version__
from dlmctl.help_screen import TwoColumns
from dlmctl.options import with_options
from dlmctl.records import interrupts, stderr
from dlmctl.records.errors import DataError, UsageError, UserFacingError


class Subcommand(NamedTuple):
    """A row of the table."""

    module: str
    """Module under `dlmctl.commands`: its function `command` is the subcommand, or its dict
    `COMMANDS` has those under it; `DEFAULT` names the one that options alone are for."""
    panel: str
    """Heading in `dlmctl --help`."""
    summary: str
    """One line of help; also the first line of the subcommand's own help."""


NAME = "dlmctl"
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
PIPE, LOOK, SETUP = "Stages of the pipe", "Look at results", "Set up"
SAE = "Sparse autoencoders"
MEMORY = "Distillation and memorization"

SUBCOMMANDS = {
    "prompts": Subcommand("prompts", PIPE, "Make prompts, or read them from files and datasets."),
    "rollout": Subcommand("rollout", PIPE, "Sample completions from a model."),
    "verify": Subcommand("verify", PIPE, "Give each completion its rewards."),
    "score-elbo": Subcommand("score_elbo", PIPE, "Score completions under models, in nats."),
    "advantage": Subcommand(
        "advantage", PIPE, "Turn the rewards of a group into advantages, on request token by token."
    ),
    "update": Subcommand("update", PIPE, "Train a model on the records and save a checkpoint."),
    "sae-train": Subcommand(
        "sae_train", SAE, "Train sparse autoencoders on activations of a model."
    ),
    "sae-eval": Subcommand(
        "sae_eval",
        SAE,
        "Measure how well sparse autoencoders reconstruct activations, and the loss on insertion.",
    ),
    "sae-activations": Subcommand(
        "sae_activations", SAE, "Store activations of a model over a corpus."
    ),
    "sae-convert": Subcommand(
        "sae_convert", SAE, "Convert a sparse autoencoder to the folder layout of another library."
    ),
    "sae-steering": Subcommand(
        "sae_steering", SAE, "Score what steering does to a concept and to fluency."
    ),
    "sae-features": Subcommand(
        "sae_features", SAE, "Show what the features of a sparse autoencoder respond to."
    ),
    "sae-judge": Subcommand(
        "sae_judge", SAE, "Have a judge explain features and score how well it does."
    ),
    "sae-order": Subcommand(
        "sae_order", SAE, "Follow features while completions are sampled in several orders."
    ),
    "sae-probe": Subcommand(
        "sae_probe", SAE, "Measure what features have to do with known concepts."
    ),
    "distill": Subcommand("distill", MEMORY, "Distil a diffusion model into one of few steps."),
    "memo-eval": Subcommand("memo_eval", MEMORY, "Measure what a generative model memorized."),
    "stats": Subcommand("stats", LOOK, "Accuracy, pass@k, reward and length per task."),
    "view": Subcommand("view", LOOK, "Show completions token by token, shaded by numbers."),
    "chat": Subcommand(
        "chat", LOOK, "Talk with a model, and see in which order it decides its tokens."
    ),
    "plot": Subcommand("plot", LOOK, "Draw curves from metrics records."),
    "top": Subcommand(
        "top", LOOK, "Follow training runs on the terminal: curves, step, rate, time left."
    ),
    "tensorboard": Subcommand(
        "tensorboard", LOOK, "Write metrics records as event files of TensorBoard."
    ),
    "lm-eval": Subcommand(
        "lm_eval", LOOK, "Evaluate a model on the tasks of lm-evaluation-harness."
    ),
    "bench": Subcommand("bench", LOOK, "Measure speed and memory, compared with a baseline."),
    "plan": Subcommand("plan", SETUP, "Say what a training run needs, from config.json alone."),
    "merge": Subcommand("merge", SETUP, "Write a model as plain weights, its adapters merged in."),
    "push": Subcommand(
        "push", SETUP, "Send a run, a model or autoencoders to the Hugging Face hub."
    ),
    "pull": Subcommand(
        "pull", SETUP, "Fetch a model, an adapter or autoencoders from the Hugging Face hub."
    ),
    "init": Subcommand(
        "init",
        SETUP,
        "Make a small new model of any family, or one from another model.",
    ),
    "doctor": Subcommand(
        "doctor",
        SETUP,
        "Say what this machine has and what is missing, and how a model would be read.",
    ),
}
FORMER = {
    "sae-stability": Subcommand("sae_stability", SAE, "Former name of 'sae-eval --tuned MODEL'."),
}
"""Subcommands that still work under a former name, which help and manual do not list."""
KNOWN = SUBCOMMANDS | FORMER


def with_exit_codes(function: Callable[..., None], name: str) -> Callable[..., None]:
    """Turn the errors meant for the user into one line on stderr and their exit code.

    Args:
        name: the subcommand's full one.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        interrupts.call(name)
        try:
            _check_processes(function)
            function(*args, **kwargs)
        except UserFacingError as error:
            hint = ""
            if isinstance(error, DataError) and error.skippable and "on_error" in kwargs:
                hint = "; --on-error skip continues without it"
            print(f"dlmctl: {error}{hint}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            # The reader has seen enough; point stdout elsewhere so that the exit flush is silent.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                raise
            print(
                "dlmctl: the device has not enough memory: give a smaller --batch-size",
                file=sys.stderr,
            )
            raise typer.Exit(69) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run


def _check_processes(function: Callable[..., None]) -> None:
    """Raise UsageError where torchrun started several processes of what is one."""
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and not hasattr(function, "runs_on_every_rank"):
        raise UsageError(
            "torchrun is for what trains: 'dlmctl update', 'sae-train', 'distill teacher', 'cd' "
            "and 'masked'; this is one process"
        )


def load(name: str) -> Any:
    """The click command behind a subcommand, its module imported."""
    app = typer.Typer(
        cls=_group(getattr(_module(name), "DEFAULT", None)),
        add_completion=False,
        context_settings=HELP_OPTIONS,
        help=KNOWN[name].summary,
        no_args_is_help=True,
    )
    if hasattr(_module(name), "COMMANDS"):
        app.callback()(lambda: None)  # a group of one subcommand is a group
    for full_name, function in functions(name).items():
        text = help_text(function)
        settings = {"ignore_unknown_options": getattr(_module(name), "PASSES_ON", False)}
        name_here = full_name.split()[-1]
        app.command(name_here, cls=TwoColumns, help=text, context_settings=settings)(
            with_exit_codes(function, full_name)
        )
    return typer.main.get_command(app)


def help_text(function: Callable[..., None]) -> str:
    """A function's docstring with a line for each paragraph, so that any terminal can fill it."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def functions(name: str) -> dict[str, Callable[..., None]]:
    """The functions behind a subcommand by their full names: itself, or those under it."""
    module = _module(name)
    if hasattr(module, "COMMANDS"):
        return {f"{name} {under}": with_options(f) for under, f in module.COMMANDS.items()}
    return {name: with_options(module.command)}


def _module(name: str) -> Any:
    return importlib.import_module(f"dlmctl.commands.{KNOWN[name].module}")


def _group(default: str | None) -> type[TyperGroup]:
    """A group that takes options without a subcommand as those of `default`."""

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            asks = args and args[0] not in HELP_OPTIONS["help_option_names"]
            if default and asks and args[0].startswith("-"):
                args = [default, *args]
            return super().parse_args(ctx, args)

    return Group


class LazyGroup(TyperGroup):
    """A group that lists its subcommands from the table and imports only the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # By these typer tells what a wrong name may have meant.
        self.commands = {name: self.get_command(ctx, name) for name in KNOWN}
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in KNOWN else command, rest

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        row = KNOWN.get(cmd_name)
        if row is None:
            return None
        return TyperCommand(cmd_name, help=row.summary, rich_help_panel=row.panel)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)


def _version(show: bool) -> None:
    if show:
        print(f"dlmctl {__version__}")
        raise typer.Exit


@app.callback()
def dlmctl(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Post-training of diffusion language models as Unix pipes.

    Every subcommand reads and writes JSON Lines, so that a whole study is a shell pipe:

    dlmctl prompts sudoku | dlmctl rollout | dlmctl verify | dlmctl update --algo rspo -o runs/a
    """


def _called() -> str:
    """The subcommand's name; before it is loaded, that of a group alone."""
    return next((word for word in sys.argv[1:] if word in KNOWN), NAME)


def main() -> None:
    """The command line, in a process of its own."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait by spinning take the cores from other stages and other runs: three
        # updates at once on four cores were a hundred times slower than one. Read by libgomp when
        # torch loads it.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # What the imports make stays, and the default of 700 has it all walked over again and again: a
    # tenth of the start of `rollout`. No tensor is in a cycle, so that no memory waits for this.
    gc.set_threshold(10_000)
    stderr.forgive()
    uninstall: Callable[[], None] = lambda: None  # noqa: E731
    with contextlib.suppress(interrupts.Interrupted):  # which may come while we end by ourselves
        try:
            uninstall = interrupts.install(_called())
            app(prog_name=NAME)
        except BaseException:
            if not interrupts.stopping():
                stderr.settle()
                uninstall()
                raise
        finally:
            interrupts.raise_no_more()  # outside of this block nothing catches it
    # Behind the block, for what was under way is closed when the exception is gone.
    if interrupts.stopping():
        interrupts.end()
