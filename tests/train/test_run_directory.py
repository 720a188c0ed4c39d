"""The directory of a run: every field of its counters comes back, and only lost work is removed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import invoke, read_jsonl

from dlmctl.records.errors import DataError, UsageError
from dlmctl.train.optimizer import optimizer_state, restore_optimizer
from dlmctl.train.run_directory import RunDirectory, checkpoint_numbers, latest_checkpoint


@dataclass
class Counters:
    """What is declared here is all that a trainer says of a field."""

    name: str
    step: int = 0
    share: float = 0.5
    lists: dict[str, Any] = field(default_factory=dict)


def opened(path: Path, in_state: bool = False) -> tuple[RunDirectory[Counters], Counters | None]:
    directory = RunDirectory(path, Counters, in_state=in_state)
    return directory, directory.open(lambda counters: None)


def save(directory: RunDirectory[Counters], step: int, keep: int = 2) -> None:
    directory.save(step, Counters("ü", step), lambda path: (path / "w").write_text("w"), keep)


@pytest.mark.parametrize("in_state", [False, True])
def test_every_field_is_restored_by_its_name(tmp_path: Path, in_state: bool) -> None:
    directory, before = opened(tmp_path / "run", in_state)
    assert before is None
    assert directory.checkpoint is None
    saved = Counters("ü", 3, 0.1 + 0.2, {"a": [1, None]})
    target = directory.save(3, saved, lambda path: None)
    again, found = opened(tmp_path / "run", in_state)
    assert found == saved
    assert again.checkpoint == target.resolve()
    assert target.parent == (tmp_path / "run/state" if in_state else tmp_path / "run")
    directory.discard_state()
    assert target.exists() != in_state


@pytest.mark.parametrize(
    "text", ["", "[]", '{"name": 3}', '{"name": "a", "steps": 1}', '{"step": 1}', '{"name": "\ud800'
             '"}', "[" * 100_000]
)  # fmt: skip
def test_counters_that_are_not_as_declared_are_refused(tmp_path: Path, text: str) -> None:
    directory, _ = opened(tmp_path)
    save(directory, 1)
    (tmp_path / "latest/dlmctl.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"not a checkpoint's dlmctl\.json"):
        opened(tmp_path)


def test_the_last_checkpoints_stay(tmp_path: Path) -> None:
    directory, _ = opened(tmp_path)
    for step in (1, 2, 999_999, 1_000_000):  # a name of more digits sorts before the others
        save(directory, step)
        assert os.readlink(tmp_path / "latest") == f"step-{step:06d}"
    assert sorted(checkpoint_numbers(tmp_path)) == [999_999, 1_000_000]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_no_link_points_to_yet_does_not_displace_the_newest(
    tmp_path: Path, keep: int
) -> None:
    directory, _ = opened(tmp_path)
    save(directory, 4)
    (tmp_path / "step-000006").mkdir()  # of a process that was killed before it changed the link
    save(directory, 5, keep)
    assert sorted(checkpoint_numbers(tmp_path)) == ([5, 6] if keep == 1 else [4, 5, 6])
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-000005"
    save(directory, 7, keep)
    assert sorted(checkpoint_numbers(tmp_path)) == ([7] if keep == 1 else [6, 7])


def test_a_refused_run_is_left_as_it_was(tmp_path: Path) -> None:
    directory, _ = opened(tmp_path)
    directory.append({"step": 1})
    save(directory, 1)
    directory.append({"step": 2})

    def refuse(counters: Counters | None) -> None:
        assert counters == Counters("ü", 1)
        directory.check_settings({"seed": 1, "betas": [1, 2]}, {"seed": 2, "betas": (1, 2)})

    with pytest.raises(UsageError, match=r"holds a run with another seed: give the same options"):
        RunDirectory(tmp_path, Counters).open(refuse)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    with pytest.raises(UsageError, match="another more, less:"):
        directory.check_settings({"less": None, "same": 1}, {"more": None, "same": 1})


def test_metrics_are_cut_where_they_were_at_a_checkpoint(tmp_path: Path) -> None:
    directory, _ = opened(tmp_path)
    assert directory.metrics_size() == 0
    directory.append({"step": 1})
    size = directory.metrics_size()
    directory.append({"step": 2})
    directory.cut_metrics(size)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]
    directory.cut_metrics(0)
    assert not directory.metrics.exists()


def test_no_trainer_takes_the_directory_of_another_kind(tmp_path: Path, saved_models: Any) -> None:
    """Or it would remove metrics and models that it takes for its own old ones."""
    (tmp_path / "records.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 9)
    small = f"-m {saved_models('llada')} {tmp_path}/records.jsonl -q"
    lines = {
        "update": f"update --algo sft --prompts-per-step 9 {small}",
        "sae-train": f"sae-train --latents 8 -k 2 --tokens 8 --sae-batch-size 4 {small}",
        "teacher": "distill teacher builtin:digits#0:8 --network mlp --width 8 -b 4 --steps 2 -q",
    }
    for kind in ("update", "teacher"):
        run = tmp_path / kind
        assert invoke(*lines[kind].split(), "-o", run).exit_code == 0
        before = (run / "metrics.jsonl").read_bytes()
        for other in lines.keys() - {kind}:
            refused = invoke(*lines[other].split(), "-o", run)
            assert refused.exit_code == 73, refused.output
            assert "choose another -o" in refused.stderr
        assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.RAdam(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_moments_of_any_optimizer_come_back(make: Any) -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model[0](torch.ones(2, 3)).square().sum().backward()  # the second layer has no moments
        optimizer.step()

    whole = network()
    optimizer = make(whole.parameters())
    step(whole, optimizer)
    saved = optimizer_state(optimizer, dict(whole.named_parameters()))
    copies = {name: value.clone() for name, value in {**saved, "random.cpu": torch.ones(1)}.items()}
    assert not any(name.endswith("1.weight") for name in saved)
    other = network()
    other.load_state_dict(whole.state_dict())
    restored = make(other.parameters())
    restore_optimizer(restored, dict(other.named_parameters()), copies)
    step(whole, optimizer)
    step(other, restored)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
