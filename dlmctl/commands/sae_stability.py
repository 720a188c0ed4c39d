"""`dlmctl sae-stability`, the former name of `sae-eval --tuned`."""

from __future__ import annotations

from functools import wraps
from typing import Any

from dlmctl.commands import sae_eval
from dlmctl.records.errors import UsageError


@wraps(sae_eval.command)
def command(**options: Any) -> None:
    if options["tuned"] is None:
        raise UsageError("give --tuned MODEL; this command is now 'dlmctl sae-eval --tuned MODEL'")
    sae_eval.command(**options)


command.__doc__ = "Former name of 'dlmctl sae-eval --tuned MODEL', which has the same options."
