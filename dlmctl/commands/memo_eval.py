"""`dlmctl memo-eval`: what a model memorized."""

from __future__ import annotations

from dlmctl.commands import (
    memo_eval_copies,
    memo_eval_membership,
    memo_eval_prompts,
    memo_eval_samples,
    memo_eval_text,
    memo_eval_theory,
)

COMMANDS = {
    "samples": memo_eval_samples.command,
    "prompts": memo_eval_prompts.command,
    "text": memo_eval_text.command,
    "copies": memo_eval_copies.command,
    "membership": memo_eval_membership.command,
    "theory": memo_eval_theory.command,
}
DEFAULT = "samples"
