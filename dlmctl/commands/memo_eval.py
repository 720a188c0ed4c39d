"""`dlmctl memo-eval`: what a generative model memorized."""

from __future__ import annotations

from dlmctl.commands import memo_eval_theory

COMMANDS = {"theory": memo_eval_theory.command}
