"""`dlmctl distill`: students of few steps."""

from __future__ import annotations

from dlmctl.commands import distill_masked

COMMANDS = {"masked": distill_masked.command}
