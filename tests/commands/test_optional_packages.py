"""Subcommands of other packages, where these are not installed."""

from __future__ import annotations

import sys

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


def test_lm_eval_names_the_command_that_installs_it() -> None:
    done = invoke("lm-eval", "--model_args", "pretrained=builtin:puzzles", "--tasks", "gsm8k")
    assert done.exit_code == 69
    assert "pip install 'dlmctl[eval]'" in done.stderr
