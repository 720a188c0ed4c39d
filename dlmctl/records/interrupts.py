"""Ctrl-C and SIGTERM: a command says where it stands, and ends within a second.

The first signal raises `Interrupted` in the main thread, so that temporary files are removed and
programs that were started are stopped; later signals do nothing. A thread ends the command if that
takes long: the main thread may be in a long computation, or something may have caught the
exception.

The process dies by the signal, as a shell expects: `$?` is 130 or 143, and a loop around the
command ends too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import NoReturn

from dlmctl.records import stderr

GRACE = 0.6
"""Seconds from the signal to the end by force."""


class Interrupted(BaseException):
    """A signal asks for the end; only `main` may catch it."""


class _State:
    name = ""
    """Name of the command."""
    number = 0
    """The first signal; 0 before it."""
    raised = False
    handed_over = False
    """Whether Ctrl-C is the command's own."""
    summary: Callable[[], str] | None = None
    ending = threading.Lock()
    """Taken by the thread that ends the process."""


def describe(summary: Callable[[], str]) -> None:
    """Set what the command says about itself if it is interrupted from now on."""
    _State.summary = summary


def call(name: str) -> None:
    """Set the command's full name; `install` may know only the beginning of it."""
    _State.name = name


def command() -> str:
    """The command's name."""
    return _State.name


def stopping() -> bool:
    """Whether a signal has come."""
    return _State.number != 0


def raise_no_more() -> None:
    """From now on a signal raises nothing: the watching thread ends the process."""
    _State.raised = True


def hand_over() -> None:
    """From now on each Ctrl-C raises KeyboardInterrupt in the main thread, and ends nothing."""
    _State.handed_over = True


def standing(directory: Path, link: Path, now: int, unit: str = "step") -> str:
    """What a trainer says about itself.

    Args:
        link: to its newest saved state, whose name ends in a number.
        now: number of the last step.
    """
    try:
        saved = int(os.readlink(link).rpartition("-")[2])
    except (OSError, ValueError):
        return (
            f"{directory} was at {unit} {now} and has nothing saved: the same command starts over"
        )
    return (
        f"{directory} was at {unit} {now}; the newest saved state is of {unit} {saved}, where the "
        "same command resumes"
    )


def install(name: str) -> Callable[[], None]:
    """Handle both signals, unless they are ignored (nohup); returns the function that undoes it.

    Raises:
        Interrupted: a signal has already come.
    """
    _State.name, _State.number, _State.raised, _State.summary = name, 0, False, None
    _State.handed_over = False
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: h for number, h in handlers.items() if h is not signal.SIG_IGN}
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, set(before)), daemon=True).start()
    for number in before:
        signal.signal(number, _raise)

    def uninstall() -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            # A Ctrl-C while the interpreter shuts down, with all work done, shows no traceback.
            python = handler is signal.default_int_handler
            signal.signal(number, signal.SIG_DFL if python else handler)
        os.close(writing)

    return uninstall


def end() -> NoReturn:
    """Say where the command stands, and die by the signal."""
    if not _State.ending.acquire(blocking=False):
        time.sleep(60)  # the other thread is about to end the process
    number = _State.number or signal.SIGINT
    line = f"dlmctl: {_State.name} interrupted"
    with contextlib.suppress(Exception):
        line += f": {_State.summary()}" if _State.summary else ""
    if os.environ.get("RANK", "0") != "0":  # torchrun ends all ranks; the first speaks for them
        line = ""
    with contextlib.suppress(OSError):
        os.write(2, stderr.close() + (stderr.shown(f"{line}\n".encode()) if line else b""))
    with contextlib.suppress(Exception):
        import ctypes

        # signal.signal works only in the main thread.
        ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(0))
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    # Some modules in C++ or Rust do not survive an exception while they are imported. The watching
    # thread sends the signal again, or ends the process.
    importing = any(
        caller.f_code.co_filename == "<frozen importlib._bootstrap>"
        for caller, _ in walk_stack(frame)
    )
    if _commands_own(number):
        if importing:
            return
        raise KeyboardInterrupt
    _State.number = _State.number or number
    if not _State.raised and not importing:
        _State.raised = True
        sys.unraisablehook = _unraisable  # the signal may come where nothing can be raised: __del__
        raise Interrupted


def _commands_own(number: int) -> bool:
    return _State.handed_over and number == signal.SIGINT


def _unraisable(about: sys.UnraisableHookArgs) -> None:
    """Report other exceptions than ours, after which the watching thread ends the process."""
    if about.exc_type is not Interrupted:
        sys.__unraisablehook__(about)


def _watch(reading: int, numbers: set[signal.Signals]) -> None:
    """End the process in time, whatever the main thread does."""
    # For `end`: after the signal, an import may have to wait for one that hangs.
    import ctypes  # noqa: F401

    while came := os.read(reading, 1):
        if came[0] in numbers and not _commands_own(came[0]):  # others have their own handlers
            _State.number = _State.number or came[0]
            # Give the main thread its time, and repeat the signal until it has been raised.
            over = time.monotonic() + GRACE
            while time.monotonic() < over:
                time.sleep(GRACE / 12)
                if not _State.raised:
                    signal.pthread_kill(threading.main_thread().ident or 0, came[0])
            end()
    os.close(reading)


def _forget() -> None:
    """In a forked child: its signals are its own, and wake nobody here."""
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
