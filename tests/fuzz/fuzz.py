"""Fuzzing of everything that reads.

    python tests/fuzz/fuzz.py --inputs 1000000 --seed 0 [--target NAME] [--findings DIRECTORY]
    python tests/fuzz/fuzz.py --replay FILE...

Each target runs in a process of its own, under a limit of time per input and an audit hook that
forbids to run, reach, or write anything outside of a temporary folder. A parent kills a process
that an input keeps busy for WATCH seconds, or sees it crash, keeps the input, and goes on with the
next. Prints a line of JSON for each target, and ends with exit code 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import mmap
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no directory may be one of the hub
sys.path.insert(0, str(Path(__file__).parent))

from engine_targets import engine_targets
from file_targets import file_targets, prepare
from guards import PACKAGE, Clock, ForbiddenError, HangError, Lines, Watch
from record_targets import process_targets, record_targets
from target import Target

from dlmctl.records.errors import UserFacingError

WATCH = 60.0
"""Seconds without a new input after which a process is taken to hang in a call of C."""
AGAIN = 20.0
"""Seconds for an input that took too long by the wall's clock, which other work may have slowed."""
ADDRESS_SPACE = 24 << 30
SHARED = 1 << 20
"""Bytes of the file by which a process says what it reads."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where files cost little, since most inputs become one."""
MOST_KEPT = 3000
"""Inputs that others are made from."""


@dataclass
class Outcome:
    """What came of a target."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    lines: int = 0
    kept: int = 0
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)


def all_targets() -> dict[str, Target]:
    """Every target by its name."""
    cheap = [*record_targets(), *engine_targets()]
    return {t.name: t for t in [*cheap, *process_targets(), *file_targets()]}


class Runner:
    """Runs one target in this process.

    Args:
        folder: an empty folder, the only one that the target may write to.
    """

    def __init__(self, target: Target, folder: Path, watch: Watch, lines: Lines | None) -> None:
        self.target, self.folder, self.watch, self.lines = target, folder, watch, lines
        self.clock, self.outcome = Clock(), Outcome()
        self.inputs: dict[str, bytes] = {}
        """An input of each finding."""
        self.warm()

    def warm(self) -> None:
        """Give it its sound inputs unwatched, which loads what is loaded late."""
        for seed in self.target.beginnings():
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                with contextlib.suppress(UserFacingError):
                    self.target.run(seed, self.folder)

    def one(self, data: bytes) -> int:
        """Give the target an input; how many new lines it reached."""
        fresh = 0
        problem = self._attempt(data, self.target.wall)
        if isinstance(problem, HangError) or self.clock.wall > self.target.wall:
            first = self.clock.cpu
            problem = self._attempt(data, AGAIN)
            cost = min(first, self.clock.cpu) if not isinstance(problem, HangError) else AGAIN
            if cost > self.target.wall:
                problem = problem or HangError(f"took {cost:.1f} s of processor time")
        else:
            self.outcome.slowest = max(self.outcome.slowest, self.clock.wall)
        self.outcome.inputs += 1
        self.outcome.seconds += self.clock.wall
        if self.watch.seen:
            problem = ForbiddenError(self.watch.seen[0])
        if problem is None:
            self.outcome.accepted += 1
        elif isinstance(problem, UserFacingError):
            self.outcome.refused += 1
        else:
            self._found(problem, data)
        fresh, self._fresh = self._fresh, 0
        return fresh

    _fresh = 0

    def _attempt(self, data: bytes, seconds: float) -> BaseException | None:
        """What the target raised."""
        caught: list[BaseException] = []

        def call() -> None:
            try:
                with (
                    self.watch.on(self.target.starts, self.target.imports),
                    self.clock.limit(seconds),
                ):
                    self.target.run(data, self.folder)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                caught.append(error)

        with contextlib.redirect_stderr(io.StringIO()):
            if self.lines is None:
                call()
            else:
                self._fresh = self.lines.new(call)
        return caught[0] if caught else None

    def _found(self, problem: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(problem.__traceback__)
        ours = [f"{f.filename.removeprefix(PACKAGE)}:{f.lineno}"
                for f in frames if f.filename.startswith(PACKAGE)]  # fmt: skip
        key = f"{type(problem).__name__} {ours[-1] if ours else ''}"
        known = self.outcome.findings.setdefault(
            key, {"count": 0, "message": f"{problem!s:.300}", "frames": ours[-4:]}
        )
        known["count"] += 1
        if key not in self.inputs or len(data) < len(self.inputs[key]):
            self.inputs[key] = data


def fuzz(runner: Runner, count: int, seed: str, tell: Any = None, until: float = 0.0) -> None:
    """Give a target `count` inputs; those that reach new lines are kept and changed further.

    Args:
        tell: called with each input before it is given.
        until: time.monotonic() at which to stop; 0 is never.
    """
    draw = random.Random(seed)
    kept = runner.target.beginnings()
    for number in range(count):
        if number < len(kept) and number < 50:
            data = kept[number]
        else:
            data = runner.target.mutate(draw.choice(kept), draw)
            if draw.random() < 0.3:
                data = runner.target.mutate(data, draw)
        if tell is not None:
            tell(data)
        # Few long ones, which are slow to change further.
        if runner.one(data) and len(data) < 20_000 and len(kept) < MOST_KEPT:
            kept.append(data)
        if until and time.monotonic() > until:
            break
    runner.outcome.kept = len(kept)
    runner.outcome.lines = len(runner.lines.seen) if runner.lines else 0


def worker(
    target: Target, count: int, seed: str, shared: Path, result: Path, seconds: float
) -> None:
    """The process of a target: says in `shared` what it reads, and in `result` what came of it."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.dup2(os.open(shared.with_name("stderr"), os.O_WRONLY | os.O_CREAT), 2)
    with (
        shared.open("r+b") as file,
        mmap.mmap(file.fileno(), SHARED) as page,
        tempfile.TemporaryDirectory(prefix="dlmctl-fuzz-", dir=MEMORY) as folder,
    ):
        os.chdir(folder)
        place = Path(folder) / "work"
        place.mkdir()
        tempfile.tempdir = folder
        runner = Runner(target, place, Watch(Path(folder)), Lines())

        def tell(data: bytes) -> None:
            page[16 : 16 + min(len(data), SHARED - 16)] = data[: SHARED - 16]
            page[8:16] = len(data).to_bytes(8, "little")
            page[0:8] = (runner.outcome.inputs + 1).to_bytes(8, "little")

        fuzz(runner, count, seed, tell, time.monotonic() + seconds if seconds else 0.0)
        os.chdir("/")
    held = {key: data.hex() for key, data in runner.inputs.items()}
    result.write_text(json.dumps({"outcome": vars(runner.outcome), "inputs": held}))


def supervise(target: Target, count: int, seed: int, findings: Path, seconds: float) -> Outcome:
    """Run a target in processes of its own, as many as its inputs kill."""
    total, attempt, began = Outcome(), 0, time.monotonic()
    fork = multiprocessing.get_context("fork")  # what is loaded already is not loaded again
    while total.inputs < count and attempt < 20:
        left = seconds - (time.monotonic() - began) if seconds else 0.0
        if left < 0:
            break
        with tempfile.TemporaryDirectory(prefix="dlmctl-fuzz-parent-", dir=MEMORY) as folder:
            shared, result = Path(folder) / "shared", Path(folder) / "result"
            shared.write_bytes(bytes(SHARED))
            name = f"{seed}/{target.name}/{attempt}"
            process = fork.Process(
                target=worker, args=(target, count - total.inputs, name, shared, result, left)
            )
            process.start()
            why = _wait(process, shared)
            if result.exists():
                said = json.loads(result.read_text())
                outcome = Outcome(**said["outcome"])
                inputs = {key: bytes.fromhex(data) for key, data in said["inputs"].items()}
            else:
                outcome, inputs = _killed(shared, why)
            _add(total, outcome)
            for key, data in inputs.items():
                digest = blake2b(key.encode(), digest_size=5).hexdigest()
                findings.mkdir(parents=True, exist_ok=True)
                (findings / f"{target.name}-{digest}").write_bytes(data)
        attempt += 1
    return total


def _wait(process: BaseProcess, shared: Path) -> str:
    """Wait for its end, or make one where nothing moves; says how it ended."""
    last, since = -1, time.monotonic()
    while process.is_alive():
        process.join(0.5)
        with shared.open("rb") as file:
            number = int.from_bytes(file.read(8), "little")
        if number != last:
            last, since = number, time.monotonic()
        # Loading the libraries takes long before the first input.
        elif time.monotonic() - since > (WATCH if number else 5 * WATCH):
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return f"Hang in C: {WATCH:g} s without an answer"
    said = shared.with_name("stderr")
    last = said.read_text(errors="replace").strip().splitlines()[-1:] if said.exists() else []
    return f"Crash: exit {process.exitcode} {' '.join(last)[:200]}"


def _killed(shared: Path, why: str) -> tuple[Outcome, dict[str, bytes]]:
    said = shared.read_bytes()
    count, length = (int.from_bytes(said[i : i + 8], "little") for i in (0, 8))
    data = said[16 : 16 + length]
    entry = {"count": 1, "message": why, "frames": []}
    return Outcome(inputs=max(1, count), findings={why: entry}), {why: data}


def _add(total: Outcome, outcome: Outcome) -> None:
    for name in ("inputs", "accepted", "refused", "seconds"):
        setattr(total, name, getattr(total, name) + getattr(outcome, name))
    for name in ("slowest", "lines", "kept"):
        setattr(total, name, max(getattr(total, name), getattr(outcome, name)))
    for key, entry in outcome.findings.items():
        known = total.findings.setdefault(key, {**entry, "count": 0})
        known["count"] += entry["count"]


def replay(files: list[Path]) -> int:
    """Give saved inputs, named TARGET-DIGEST, to their targets; says what came of each."""
    targets, found = all_targets(), 0
    with tempfile.TemporaryDirectory(prefix="dlmctl-fuzz-", dir=MEMORY) as folder:
        watch = Watch(Path(folder))
        for number, file in enumerate(files):
            place = Path(folder) / str(number)
            place.mkdir()
            runner = Runner(targets[file.name.rpartition("-")[0]], place, watch, None)
            runner.one(file.read_bytes())
            problems = runner.outcome.findings
            found += bool(problems)
            print(json.dumps({"file": str(file), "findings": problems}))
    return int(found > 0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this one; repeatable")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--seconds", type=float, default=0.0, help="most for each target")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE")
    given = parser.parse_args()
    if given.replay:
        return replay(given.replay)
    targets, slow = all_targets(), {target.name for target in file_targets()}
    chosen = [targets[name] for name in given.target or targets]
    shares, found = sum(target.share for target in chosen), 0
    if any(target.name in slow for target in chosen):
        prepare()
    for target in chosen:
        count = max(20, round(given.inputs * target.share / shares))
        outcome = supervise(target, count, given.seed, given.findings.resolve(), given.seconds)
        found += len(outcome.findings)
        rate = outcome.inputs / outcome.seconds if outcome.seconds else 0.0
        row = {"target": target.name, **vars(outcome), "per_second": round(rate, 1)}
        print(json.dumps(row), flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
