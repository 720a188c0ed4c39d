"""Checkpoints: `RUN/step-000012`, and `RUN/latest`, a link to the newest one.

A checkpoint is an ordinary Hugging Face directory (or a peft adapter) with three files more:

    README.md               the model card
    dlmctl.json             what the run is (algorithm, reference) and its counters
    training.safetensors    moments of the optimizer by parameter name, and the random state

It is written beside and renamed, so that killing the process at any moment leaves the previous one
whole; the same command then goes on from there.

Of a run of several ranks the first writes the files that one process would, so that a run goes on
at any number of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import orjson
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError
from dlmctl.records.files import (
    publish_directory,
    publish_link,
    remove_directory,
    remove_partials,
    write_file,
)
from dlmctl.train.card import Card, write_card
from dlmctl.train.distributed import is_first
from dlmctl.train.sharding import like, to_first


@dataclass
class Progress:
    """Counters of a run, kept in `dlmctl.json`."""

    algo: str
    reference: str
    """Name of the model that the run began with."""
    reference_revision: str
    step: int = 0
    """Optimizer steps taken, those skipped included."""
    round: int = 0
    """Rounds of rollouts trained on."""
    skipped: int = 0
    """Steps left out because a gradient was not finite."""
    completions: int = 0
    tokens: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run directory, or None when it has none."""
    link = run / "latest"
    return link.resolve() if (link / "dlmctl.json").exists() else None


def read_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint; raises DataError when the file is not ours."""
    path = checkpoint / "dlmctl.json"
    try:
        progress = Progress(**orjson.loads(path.read_bytes()))
        for name, kind in get_type_hints(Progress).items():
            if not isinstance(getattr(progress, name), get_origin(kind) or kind):
                raise TypeError(f"{name} is no {kind}")
    except (OSError, TypeError, orjson.JSONDecodeError) as error:
        raise DataError(f"not a checkpoint's dlmctl.json ({error})", str(path)) from None
    return progress


def save_checkpoint(
    run: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    progress: Progress,
    keep: int,
    whole: Callable[[], Policy],
    card: Callable[[Policy], Card] | None = None,
) -> Path:
    """Publish the state of a run as its newest checkpoint and remove all but the last `keep`.

    Args:
        whole: makes the policy with all its weights, on the first rank, of one that may be spread
            over several; each of them calls this.
        card: of that policy.

    Raises:
        CannotCreateError: the directory cannot be made.
        CannotWriteError: writing failed; the previous checkpoint is whole.
    """
    target = run / f"step-{progress.step:06d}"
    state = _optimizer_state(optimizer, parameters) | _random_state(policy.device)
    saved = whole()
    if not is_first():
        return target

    def fill(directory: Path) -> None:
        save_policy(saved, directory)
        save_file(state, directory / "training.safetensors")
        write_file(
            directory / "dlmctl.json", orjson.dumps(asdict(progress), option=orjson.OPT_INDENT_2)
        )
        if card is not None:  # in the place of the one that peft writes
            write_card(directory, card(saved))

    publish_directory(target, fill)
    publish_link(run / "latest", target.name)
    for old in _checkpoints(run)[:-keep]:
        remove_directory(old)
    return target


def restore_training(
    checkpoint: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> None:
    """Put the optimizer's moments and the random state back as they were."""
    tensors = load_file(checkpoint / "training.safetensors")
    for name, parameter in parameters.items():
        moments = {
            key: like(tensors[f"optimizer.{key}.{name}"], parameter)
            for key in ("exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if moments:
            step = tensors[f"optimizer.step.{name}"]
            optimizer.state[parameter] = {"step": step, **moments}
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def forget_steps(run: Path, step: int) -> None:
    """Take out of a run what a killed process left: half-written files, and metrics after `step`.

    The steps behind the newest checkpoint are lost with the process and will be taken again.
    """
    remove_partials(run)
    log = run / "metrics.jsonl"
    if not log.exists():
        return
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
    if len(kept) < len(lines):
        write_file(log, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    try:
        return int(orjson.loads(line)["step"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def _optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    return {
        f"optimizer.{key}.{name}": to_first(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def _checkpoints(run: Path) -> list[Path]:
    return sorted(p for p in run.iterdir() if re.fullmatch(r"step-\d+", p.name))
