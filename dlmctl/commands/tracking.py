"""Trackers besides metrics.jsonl: `--log` of the commands that train."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmctl.records.interrupts import stopping
from dlmctl.report.follower import DONE
from dlmctl.report.trackers import trackers_of

WAIT_S = 60.0
"""How long a command that is done waits for its trackers."""
START = """import sys, json
sys.path[:] = json.loads(sys.argv.pop(1))
from dlmctl.report.follower import main
main()"""
"""The program of a follower: it finds the packages where this process does."""


def check_trackers(log: Sequence[str] | None) -> None:
    """Refuse trackers that do not exist or are not installed; raises as `trackers_of`."""
    trackers_of(log)


@contextlib.contextmanager
def tracked(log: Sequence[str] | None, directory: Path, about: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, a process for each tracker sends it what metrics.jsonl gets.

    The first rank does this, once steps that were lost have left the file.

    Args:
        about: settings of the run.
    """
    names = trackers_of(log) if os.environ.get("RANK", "0") == "0" else []
    line = json.dumps(dict(about), default=str).encode() + b"\n"
    followers = [_start(name, directory, line) for name in names]
    whole = False
    try:
        yield
        whole = True
    finally:
        for follower in followers:
            _end(follower, whole)
        if not stopping():
            _wait(dict(zip(names, followers, strict=True)))


def _start(name: str, directory: Path, line: bytes) -> subprocess.Popen[bytes]:
    follower = subprocess.Popen(
        [sys.executable, "-c", START, json.dumps(sys.path), name, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # or Ctrl-C would end it before it has sent the last steps
    )
    with contextlib.suppress(BrokenPipeError):
        assert follower.stdin is not None
        follower.stdin.write(line)
        follower.stdin.flush()
    return follower


def _end(follower: subprocess.Popen[bytes], whole: bool) -> None:
    assert follower.stdin is not None
    with contextlib.suppress(OSError):
        follower.stdin.write(DONE if whole else b"")
        follower.stdin.close()


def _wait(followers: Mapping[str, subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + WAIT_S
    for name, follower in followers.items():
        try:
            follower.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(
                f"dlmctl: {name} has not taken the last metrics yet; process {follower.pid} goes "
                "on with it",
                file=sys.stderr,
            )
