"""Starts the harness that runs untrusted code, reads its report, and leaves nothing behind.

The code runs in an isolated interpreter without site packages, environment, standard streams or
files of its own, in an empty working directory, with limits on time and memory. On Linux, the
kernel (Landlock, seccomp) lets it read only the standard library and write no file, and denies it
network, other processes and signals to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlmctl.verifiers.harness import END

HARNESS = Path(__file__).with_name("harness.py")
LONGEST_STEP = 2000
"""Most bytes in the report of a step, well above what the harness writes."""
REAPED = 1.0
"""Most seconds until processes that were killed are gone."""
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class Code(NamedTuple):
    """What to run, in this order, in one module."""

    before: str
    """It may fail."""
    setup: list[str]
    code: str
    tests: list[str]
    inputs: Sequence[str] = ()
    """If there are any, `setup` and `code` run as a program, once with each as standard input."""
    sizes: Sequence[int] = ()
    """Most bytes that it may print for each."""


class Report(NamedTuple):
    """The results."""

    steps: dict[str, Any]
    """`load` and numbers of tests to the problem, or None; only steps that were reached. Numbers of
    inputs to `output`, and to `why`, the problem."""
    why: str
    """Why it stopped early; empty if it did not."""
    lacking: str | None
    """Why the kernel did not confine it."""


def run_code(code: Code, time_limit: float, memory: int, unconfined: bool = False) -> Report:
    """Run code in a process that is gone, with its files, when this returns.

    Args:
        time_limit: seconds for everything together.
        memory: bytes of address space.
        unconfined: run it even if the kernel cannot confine it.
    """
    token, paths = secrets.token_hex(16), sysconfig.get_paths()
    library = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib")]
    request = {
        **code._asdict(),
        "token": token,
        "seconds": time_limit,
        "memory": memory,
        "unconfined": unconfined,
        "readable": [*READABLE, *DEVICES, *library],
    }
    with tempfile.TemporaryDirectory(prefix="dlmctl-code-", ignore_cleanup_errors=True) as folder:
        reads, writes = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(HARNESS), str(writes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                pass_fds=[writes],
                start_new_session=True,
            )
        except BaseException:
            os.close(reads)
            raise
        finally:
            os.close(writes)
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(request).encode())
            steps = len(code.tests) + len(code.inputs)
            # JSON has up to six bytes for one.
            longest = LONGEST_STEP * (steps + 10) + 6 * sum(code.sizes)
            report, why = _read(process, reads, token, time_limit, longest)
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(reads)
            _await_end(process.pid)
    return _report(report, token, why)


def _await_end(group: int) -> None:
    """Wait until the processes of a group, which were killed, are gone.

    That takes a moment. Where nobody reaps orphans, as in some containers, they stay as zombies.
    """
    end = time.monotonic() + REAPED
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except OSError:
            return
        time.sleep(0.005)


def _read(
    process: subprocess.Popen[bytes], reads: int, token: str, time_limit: float, longest: int
) -> tuple[bytes, str]:
    """The report until its end, and why it is incomplete; empty if it is whole."""
    last = f"{token} {END} ".encode()
    refused = f"{token} confine ".encode()
    end, report = time.monotonic() + time_limit, b""
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return report, f"took longer than {time_limit:g} s"
        # A child process may keep the pipe open.
        ended = process.poll() is not None
        if select.select([reads], [], [], 0.0 if ended else min(left, 0.05))[0]:
            chunk = os.read(reads, 1 << 16)
            report += chunk
            if len(report) > longest:
                return report, "wrote to the harness's report"
            # Look only at whole lines, and only at the newest, so that time stays linear.
            recent = report[-len(chunk) - 400 :]
            if (last in recent or refused in recent) and report.endswith(b"\n"):
                return report, ""
            if chunk:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            ended = True
        if ended:
            code = process.poll()
            if code is None:
                return report, "closed the harness's report"
            how = f"signal {-code}" if code < 0 else f"exit {code}"
            return report, f"the process ended before its tests did ({how})"


def _report(report: bytes, token: str, why: str) -> Report:
    steps: dict[str, Any] = {}
    lacking = None
    for line in report.splitlines():
        mine, _, rest = line.decode("utf-8", "replace").partition(" ")
        step, _, text = rest.partition(" ")
        if mine != token:
            continue  # the code wrote it
        with contextlib.suppress(ValueError):
            problem = json.loads(text)
            if step in (END, "confine"):
                lacking = problem
            else:
                # The first report of a step counts; anything but None is a problem.
                steps.setdefault(step, problem)
    return Report(steps, why, lacking)
