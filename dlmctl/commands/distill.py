"""`dlmctl distill`: diffusion models, and models of few steps made from them."""

from __future__ import annotations

from dlmctl.commands import distill_cd, distill_sample, distill_teacher

COMMANDS = {
    "teacher": distill_teacher.command,
    "cd": distill_cd.command,
    "sample": distill_sample.command,
}
