"""`dlmctl memo-eval`: what a model memorized."""

from __future__ import annotations

from dlmctl.commands import memo_eval_samples

COMMANDS = {"samples": memo_eval_samples.command}
DEFAULT = "samples"
