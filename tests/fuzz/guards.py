"""What is watched while a reader runs: what it does to the machine, its time, its lines."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = str(Path(__file__).parents[2] / "dlmctl") + os.sep
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"}
NEVER = {
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"),
    *("pickle.find_class", "os.kill", "os.killpg", "shutil.unpack_archive", "code.__new__"),
}
CHANGES = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link"),
    *("os.symlink", "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile", "os.utime"),
}
MAKERS = ("dataclasses.py", "collections/__init__.py", "typing.py", "enum.py", "functools.py")
"""Of the standard library: they make functions from text of their own."""


class ForbiddenError(BaseException):
    """A reader started, wrote or reached something that is no business of a reader."""


class HangError(BaseException):
    """A reader took longer than it may."""


class Watch:
    """The audit hook of this process, which cannot be taken out again; it is idle outside `on`.

    Args:
        folder: the only place that may be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self.active = self.starts = self.imports = False
        self.seen: list[str] = []
        """What was forbidden, also where the reader caught the exception."""
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def on(self, starts: bool = False, imports: bool = False) -> Iterator[None]:
        """Watch; `starts` allows processes, `imports` modules that were not loaded before."""
        self.seen, self.starts, self.imports = [], starts, imports
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "exec":
            wrong = self._unknown_code(arguments[0])
        elif event == "open":
            wrong = self._written(arguments)
        elif event == "import":
            name = str(arguments[0])
            known = name.split(".")[0] in ("dlmctl", "encodings", "PIL", "numpy", "torch")
            wrong = not (self.imports or known)
        elif event == "marshal.loads":
            wrong = "importlib" not in sys._getframe(1).f_code.co_filename
        elif event in STARTS or event in ("os.kill", "os.killpg"):
            wrong = not self.starts
        elif event in CHANGES:
            wrong = not self._within(arguments[0])
        else:
            wrong = event in NEVER
        if wrong:
            self.seen.append(f"{event} {arguments!r:.200}")
            raise ForbiddenError(self.seen[-1])

    def _written(self, arguments: tuple[Any, ...]) -> bool:
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if isinstance(mode, str) else (flags or 0) & WRITES
        return bool(writes) and not self._within(path) and not self.starts

    def _within(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        whole = os.path.abspath(os.fsdecode(path))
        return whole == "/dev/null" or whole.startswith(self.folder + os.sep)

    @staticmethod
    def _unknown_code(code: Any) -> bool:
        """Whether code that runs is that of no file; a module's, when it is imported, is of one."""
        if not isinstance(code, CodeType):
            return True
        if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen"):
            return False
        return not sys._getframe(2).f_code.co_filename.endswith(MAKERS)


class Clock:
    """Stops what runs within it after so many seconds of the wall's clock.

    On a machine with other work that says little: `cpu` says what it cost.
    """

    def __init__(self) -> None:
        signal.signal(signal.SIGALRM, self._overrun)
        self.wall = self.cpu = 0.0
        self._within = False

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        began, cost = time.perf_counter(), time.process_time()
        self._within = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            self._within = False  # a signal that arrived may be handled only later
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self.wall, self.cpu = time.perf_counter() - began, time.process_time() - cost

    def _overrun(self, signum: int, frame: FrameType | None) -> None:
        if self._within:
            raise HangError(_places(frame))


def _places(frame: FrameType | None) -> str:
    """The innermost lines of the package under a frame."""
    found = []
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            found.append(f"{name.removeprefix(PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


class Lines:
    """Lines of the package that were reached.

    With `sys.monitoring` (Python 3.12) each line reports once and costs nothing after; before, a
    share of the inputs is traced.
    """

    def __init__(self, share: int = 16) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._monitoring = getattr(sys, "monitoring", None)
        self._share = 1 if self._monitoring else share
        self._number = 0
        if self._monitoring is not None:
            events = self._monitoring.events
            self._monitoring.use_tool_id(self._monitoring.COVERAGE_ID, "fuzz")
            self._monitoring.register_callback(
                self._monitoring.COVERAGE_ID, events.LINE, self._reached
            )
            self._monitoring.set_events(self._monitoring.COVERAGE_ID, events.LINE)

    def new(self, function: Callable[[], None]) -> int:
        """Call a function; how many lines were reached that no call before did."""
        before = len(self.seen)
        self._number += 1
        if self._monitoring is not None or (self._number % self._share and self._number > 200):
            function()
        else:
            sys.settrace(self._trace)
            try:
                function()
            finally:
                sys.settrace(None)
        return len(self.seen) - before

    def _reached(self, code: CodeType, line: int) -> Any:
        if code.co_filename.startswith(PACKAGE):
            self.seen.add((code.co_filename, line))
        return self._monitoring.DISABLE  # type: ignore[union-attr]

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        seen = self.seen

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line":
                seen.add((name, frame.f_lineno))
            return line

        return line
