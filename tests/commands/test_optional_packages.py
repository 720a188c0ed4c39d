"""Subcommands of other packages, where these are not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import invoke


@pytest.fixture(autouse=True)
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none of them were there."""
    for name in [*sys.modules]:
        if name.split(".")[0] in ("lm_eval", "tensorboard") or name == "torch.utils.tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


def test_tensorboard_names_the_command_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    done = invoke("tensorboard", tmp_path, "-o", tmp_path / "logs")
    assert done.exit_code == 69
    assert "pip install 'dlmctl[tensorboard]'" in done.stderr
    assert not (tmp_path / "logs").exists()


def test_lm_eval_names_the_command_that_installs_it() -> None:
    done = invoke("lm-eval", "--model_args", "pretrained=builtin:puzzles", "--tasks", "gsm8k")
    assert done.exit_code == 69
    assert "pip install 'dlmctl[eval]'" in done.stderr


def test_our_model_is_the_one_where_no_other_is_named() -> None:
    from dlmctl.commands.lm_eval import completed

    ours = ["--model", "dlmctl"]
    auto = [*ours, "--batch_size", "auto"]
    assert completed(["--tasks", "a"]) == [*auto, "--tasks", "a"]
    assert completed(["run", "-t", "a", "-b", "4"]) == ["run", *ours, "-t", "a", "-b", "4"]
    for given in (["--model=hf", "-t", "a"], ["-M", "hf"], ["ls", "tasks"], ["--config", "a.yaml"]):
        assert completed(given) == given


def test_a_directory_without_metrics_is_no_run(tmp_path: Path) -> None:
    from dlmctl.records.errors import MissingInputError
    from dlmctl.report.event_files import run_records

    with pytest.raises(MissingInputError, match=r"no metrics\.jsonl"):
        list(run_records([str(tmp_path)], "fail"))
