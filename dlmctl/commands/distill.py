"""`dlmctl distill`: teachers, and students of few steps."""

from __future__ import annotations

from dlmctl.commands import distill_cd, distill_lcm, distill_masked, distill_sample, distill_teacher

COMMANDS = {
    "teacher": distill_teacher.command,
    "cd": distill_cd.command,
    "lcm": distill_lcm.command,
    "sample": distill_sample.command,
    "masked": distill_masked.command,
}
