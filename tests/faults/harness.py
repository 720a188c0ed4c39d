"""Faults at random moments of a command, and what has to hold after each.

Every fault goes by its number and a seed: which job, which kind, and when, so that one that failed
can be had again. After it the outputs are whole, the command ended as designed, and the same
command goes on to what an undisturbed run leaves.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks import Trees, check_whole, differences, steps_once, tree
from jobs import JOBS, Job, make_kit, start
from preloaded import HANGS, Command
from processes import Waits, wait_for_handler

PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = 64 * 2**20


class FaultError(AssertionError):
    """What did not hold after a fault."""


@dataclass
class Ended:
    """How the disturbed command ended."""

    code: int
    said: str
    stdout: bytes
    facts: dict[str, Any]
    """What is told of the fault."""


class Harness:
    """The inputs, undisturbed runs and a place for faults.

    Args:
        soon: seconds from a signal to the end of a command, without those for a processor.
    """

    def __init__(self, place: Path, soon: float = 1.0) -> None:
        self.soon = soon
        self.place, self.kit = place, place / "kit"
        self.disk = place / "disk"
        self.trees: dict[str, Trees] = {}
        self.seconds: dict[str, float] = {}
        """How long a job takes."""
        make_kit(self.kit)

    def source(self, job: Job) -> Path | None:
        return self.kit / job.source if job.source else None

    def undisturbed(self, job: Job) -> Trees:
        """What the job leaves."""
        if job.name not in self.trees:
            home = self.place / "undisturbed" / job.name
            home.mkdir(parents=True)
            (home / "out").mkdir()
            self.finish(job, home, again=False)
            self.trees[job.name] = tree(home / "out", job)
        return self.trees[job.name]

    def finish(self, job: Job, home: Path, again: bool) -> None:
        """Run the job to its end."""
        line, begun = job.command(self.kit, again), time.monotonic()
        command = start(line, home, self.source(job), home / "stdout", home / "stderr")
        code = command.wait()
        seconds = time.monotonic() - begun
        # The shortest, so that few moments are behind the end.
        self.seconds[job.name] = min(seconds, self.seconds.get(job.name, seconds))
        said = (home / "stderr").read_text()
        if code != 0:
            raise FaultError(f"the command ended with {code} undisturbed: {said}")

    def fault(self, number: int, seed: int, job: Job, kind: str) -> dict[str, Any]:
        """Do a fault and look at what is left; raises FaultError."""
        wanted = self.undisturbed(job)
        dice = random.Random(f"{seed}/{number}")
        with self.fresh_disk() as home:
            ended = KINDS[kind].do(self, job, home, dice)
            check_whole(home / "out")
            done = not differences(tree(home / "out", job), wanted)
            _check_end(kind, ended, done)
            _check_stdout(job, ended)
            if not (done and ended.code == 0 and kind != "head"):
                self.go_on(job, home, kind, wanted)
        return {**ended.facts, "code": ended.code}

    def go_on(self, job: Job, home: Path, kind: str, wanted: Trees) -> None:
        """Run the command again; all is as if nothing had been."""
        if kind in ("full", "readonly"):
            if os.path.ismount(home):
                _mount(home, f"remount,rw,size={ROOM}")
            os.chmod(home / "out", 0o755)
        # `init` makes a directory, and is done when it is there.
        if job.name != "init" or not (home / "out" / "model").exists():
            self.finish(job, home, again=True)
        check_whole(home / "out")
        if left := [str(p) for p in (home / "out").rglob("*partial*")]:
            raise FaultError(f"left over: {left}")
        if found := differences(tree(home / "out", job), wanted):
            raise FaultError("not as undisturbed: " + "; ".join(found))
        if job.run:
            steps_once(home / job.run / "metrics.jsonl", job.steps)

    @contextmanager
    def fresh_disk(self) -> Iterator[Path]:
        """An empty directory with out/, where it can be a file system of its own."""
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()
        mounted = can_mount(self.place)
        if mounted:
            _mount(self.disk, f"size={ROOM}", "-t", "tmpfs", "tmpfs")
        try:
            (self.disk / "out").mkdir()
            yield self.disk
        finally:
            if mounted:
                subprocess.run(["umount", "-l", self.disk], check=True)


@functools.cache
def can_mount(place: Path) -> bool:
    """Whether a small tmpfs can be mounted: as root, where it is permitted."""
    probe = place / "probe"
    probe.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", probe], capture_output=True
    )
    if done.returncode == 0:
        subprocess.run(["umount", probe], check=True)
    return done.returncode == 0


def _mount(where: Path, options: str, *more: str) -> None:
    subprocess.run(["mount", "-o", options, *more, where], check=True)


def _begin(
    harness: Harness,
    job: Job,
    home: Path,
    output: int | Path | None = None,
    source: Path | None = None,
    streamed: bool = False,
) -> Command:
    line = job.command(harness.kit, streamed=streamed)
    given = source or harness.source(job)
    errors = harness.place / "stderr"
    return start(line, home, given, output or harness.place / "stdout", errors)


def _ended(harness: Harness, command: Command, **facts: Any) -> Ended:
    code = command.wait()
    said = (harness.place / "stderr").read_text()
    return Ended(code, said, (harness.place / "stdout").read_bytes(), facts)


def _moment(harness: Harness, job: Job, dice: random.Random) -> float:
    return dice.random() * harness.seconds[job.name]


def _done(harness: Harness, job: Job, home: Path) -> bool:
    """Whether all outputs are there, of a command that may still be at work."""
    try:
        return not differences(tree(home / "out", job), harness.trees[job.name])
    except FileNotFoundError:  # renamed while we looked
        return False


def _signal(number: int, harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """A signal at a random moment; SIGINT and SIGTERM once the command listens."""
    begun, command = time.monotonic(), _begin(harness, job, home)
    if number != signal.SIGKILL:
        wait_for_handler(command.pid, HANGS)
    moment = _moment(harness, job, dice)
    time.sleep(max(0.0, begun + moment - time.monotonic()))
    waits = Waits(command.pid)
    done = _done(harness, job, home)
    sent = time.monotonic()
    try:
        command.send_signal(number)
    except ProcessLookupError:
        return _ended(harness, command, at=round(moment, 3), hit=False)
    while command.returncode is None:
        try:
            command.wait(0.005)
        except TimeoutError:
            waits.look()
            if time.monotonic() - sent > HANGS:
                raise FaultError("it goes on after the signal") from None
    seconds, waited = time.monotonic() - sent, waits.seconds()
    ended = _ended(harness, command, at=round(moment, 3), hit=command.returncode != 0,
                   end=round(seconds, 3), waited=round(waited, 3))  # fmt: skip
    if not ended.facts["hit"] and not done and seconds > harness.soon:
        raise FaultError(f"the signal at {moment:.2f} s changed nothing")
    if number != signal.SIGKILL and ended.facts["hit"] and seconds - waited > harness.soon:
        raise FaultError(f"it took {seconds:.2f} s to end, {waited:.2f} of them for a processor")
    return ended


def _full(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """A file system with too few pages for the outputs; else as `_limit`."""
    if not can_mount(harness.place):
        return _limit(harness, job, home, dice)
    files = [p for p in (harness.place / "undisturbed" / job.name / "out").rglob("*")
             if p.is_file() and not p.is_symlink()]  # fmt: skip
    pages = sum(-(-p.stat().st_size // PAGE) for p in files)
    free = dice.randrange(pages)
    (home / "filler").write_bytes(b"x" * PAGE)
    _mount(home, f"remount,size={(free + 1) * PAGE}")
    return _ended(harness, _begin(harness, job, home), free=free * PAGE)


def _limit(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """No file may be longer than a random number of bytes."""
    files = (harness.place / "undisturbed" / job.name / "out").rglob("*")
    most = max(p.stat().st_size for p in files if p.is_file())
    size = dice.randrange(most)
    command = _begin(harness, job, home)
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (size, size))
    return _ended(harness, command, limit=size)


def _devfull(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """Standard output is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    (harness.place / "stdout").write_bytes(b"")
    command = _begin(harness, job, home, full, streamed=True)
    os.close(full)
    return _ended(harness, command)


def _mute(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """Standard error is full, as a log on a full disk."""
    line = job.command(harness.kit)
    command = start(line, home, harness.source(job), harness.place / "stdout", Path("/dev/full"))
    (harness.place / "stderr").write_bytes(b"")
    return _ended(harness, command)


def _head(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """The reader of standard output leaves after some lines."""
    lines = dice.randrange(4)
    reading, writing = os.pipe()
    command = _begin(harness, job, home, writing, streamed=True)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        read = b"".join(stream.readline() for _ in range(lines))
    (harness.place / "stdout").write_bytes(read)
    return _ended(harness, command, lines=lines)


def _cut(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """Standard input ends within a line."""
    source = harness.source(job)
    assert source is not None
    whole = source.read_bytes()
    starts = [0, *(n + 1 for n, byte in enumerate(whole[:-1]) if byte == 10)]
    at = dice.choice(starts)
    size = at + dice.randrange(1, whole.index(b"\n", at) - at)
    (harness.place / "cut").write_bytes(whole[:size])
    return _ended(harness, _begin(harness, job, home, source=harness.place / "cut"), size=size)


def _readonly(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """The outputs' directory takes no files."""
    if os.path.ismount(home):
        _mount(home, "remount,ro")
    else:
        os.chmod(home / "out", 0o555)
    return _ended(harness, _begin(harness, job, home))


def _second(harness: Harness, job: Job, home: Path, dice: random.Random) -> Ended:
    """Another process begins the same at a random moment."""
    command = _begin(harness, job, home)
    moment = _moment(harness, job, dice)
    time.sleep(moment)
    line = job.command(harness.kit, again=True)
    other = start(line, home, harness.source(job), harness.place / "stdout-2",
                  harness.place / "stderr-2")  # fmt: skip
    second = other.wait()
    said = (harness.place / "stderr-2").read_text()
    ended = _ended(harness, command, at=round(moment, 3), second=second)
    refused = 0
    for code, text in ((ended.code, ended.said), (second, said)):
        busy = code == 75 and text.splitlines()[-1].endswith("try again when it has ended")
        # `init` finds what the first has made.
        made = code == 73 and job.name == "init"
        refused += busy or made
        if code != 0 and not busy and not made:
            raise FaultError(f"two at once: one ended with {code}: {text}")
    if refused == 2:
        raise FaultError("two at once: neither did it")
    return Ended(0, "", b"", ended.facts)


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    do: Callable[[Harness, Job, Path, random.Random], Ended]
    codes: frozenset[int]
    """How the command may end."""
    suits: Callable[[Job], bool] = lambda _: True


KINDS = {
    "kill": Kind(functools.partial(_signal, signal.SIGKILL), frozenset({-9, 0})),
    "term": Kind(functools.partial(_signal, signal.SIGTERM), frozenset({-15, 0})),
    "int": Kind(functools.partial(_signal, signal.SIGINT), frozenset({-2, 0})),
    "full": Kind(_full, frozenset({73, 74})),
    "limit": Kind(_limit, frozenset({73, 74})),
    "devfull": Kind(_devfull, frozenset({74}), lambda job: job.streams),
    "mute": Kind(_mute, frozenset({0})),
    "head": Kind(_head, frozenset({0}), lambda job: job.streams),
    "cut": Kind(_cut, frozenset({65}), lambda job: bool(job.source)),
    "readonly": Kind(_readonly, frozenset({73})),
    "second": Kind(_second, frozenset({0})),
}


def plan(count: int, jobs: list[str], kinds: list[str]) -> list[tuple[int, Job, str]]:
    """Number, job and kind of so many faults; jobs and kinds take turns."""
    pairs = []
    for turn in range(len(jobs) * len(kinds)):
        lap, place = divmod(turn, len(jobs))
        job, kind = JOBS[jobs[place]], kinds[(place + lap) % len(kinds)]
        if KINDS[kind].suits(job):
            pairs.append((job, kind))
    return [(n, *pairs[n % len(pairs)]) for n in range(count)] if pairs else []


def _check_end(kind: str, ended: Ended, done: bool) -> None:
    if ended.code not in KINDS[kind].codes:
        raise FaultError(f"ended with {ended.code}: {ended.said}")
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        raise FaultError(f"a traceback: {ended.said}")
    last = (ended.said.splitlines() or [""])[-1]
    heard = ended.facts.get("limit", PAGE) >= PAGE  # else what is said may be cut off, too
    if ended.code > 0 and heard and not last.startswith("dlmctl: "):
        raise FaultError(f"nothing was said of {ended.code}: {ended.said}")
    # While the interpreter is taken down a signal ends it silently: all is there.
    if ended.code in (-2, -15) and " interrupted" not in last and not done:
        raise FaultError(f"no summary: {ended.said}")


def _check_stdout(job: Job, ended: Ended) -> None:
    """Whole records, but for the last line."""
    for line in ended.stdout.splitlines(keepends=True):
        if line.endswith(b"\n"):
            json.loads(line)
