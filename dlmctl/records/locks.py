"""Locks between processes that their owner's death releases, kill -9 included.

A lock is `flock` on a file that is held open: the kernel lets go of it when the last process that
has it open is gone. Readers take no lock and wait for none.

On NFS, Linux emulates `flock` by byte-range locks, which clients of the same server see when it
serves locks (NFSv4, or lockd); where it does not, or under the mount option `local_lock`, machines
do not see each other's, and one directory is to be written from one machine only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import weakref
from pathlib import Path

from dlmctl.records.errors import CannotCreateError, TryAgainError


class Lock:
    """A file that is locked as long as this object, and the process that made it, live."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.owner = os.getpid()
        self._end = weakref.finalize(self, _close, descriptor, None, self.owner)

    def remove_with(self, path: Path) -> None:
        """Remove the file when the lock is let go: it has no other purpose."""
        self._end.detach()
        self._end = weakref.finalize(self, _close, self.descriptor, path, self.owner)

    def release(self) -> None:
        """Let go of it now."""
        for identity, lock in list(_held.items()):
            if lock is self:
                del _held[identity]
        self._end()


_held: weakref.WeakValueDictionary[tuple[int, int], Lock] = weakref.WeakValueDictionary()
"""The locks of this process, by device and inode."""


def hold(path: Path, what: str, signed: bool = False) -> Lock:
    """Lock a file, which is made where there is none; within a process, as often as one likes.

    Args:
        what: the thing that is locked, for the message.
        signed: the file holds the owner's process id, for those whom the system does not tell it.

    Raises:
        TryAgainError: another process has it.
        CannotCreateError: the file cannot be made. Where its file system has no locks, a line says
            so on standard error.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CannotCreateError(f"cannot create {path} ({error.strerror})") from None
        identity = _identity(os.fstat(descriptor))
        mine = _held.get(identity)
        if mine is not None:
            os.close(descriptor)
            return mine
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = _owner(identity[1]) or (_signature(descriptor) if signed else None)
                os.close(descriptor)
                who = f"process {owner}" if owner else "another process"
                raise TryAgainError(
                    f"{who} is writing {what}: try again when it has ended"
                ) from None
            print(
                f"dlmctl: no lock on {path} ({error.strerror}): see to it that nothing else "
                f"writes {what}",
                file=sys.stderr,
            )
        with contextlib.suppress(FileNotFoundError):
            if _identity(os.stat(path)) == identity:
                lock = _held[identity] = Lock(descriptor)
                if signed:
                    os.ftruncate(descriptor, 0)
                return lock
        # Renamed or removed by its last owner between our opening it and locking it.
        os.close(descriptor)


def hold_run(directory: Path) -> Lock:
    """The lock of a run directory that is there: who has it may train in it.

    Raises:
        TryAgainError: another process trains there.
    """
    path = directory / ".lock"
    lock = hold(path, str(directory), signed=True)
    lock.remove_with(path)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its signature
        os.pwrite(lock.descriptor, f"{os.getpid()}\n".encode(), 0)
    return lock


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _owner(inode: int) -> int | None:
    """Process that has locked an inode, where the system tells (Linux, in the same container)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                return int(fields[4]) or None
    return None


def _signature(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _close(descriptor: int, path: Path | None, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has closed it already
        return
    if path is not None:
        with contextlib.suppress(OSError):
            if _identity(path.stat()) == _identity(os.fstat(descriptor)):
                path.unlink()
    os.close(descriptor)


def _forget() -> None:
    """In a forked child: the parent's locks are not ours, and must not outlive it through us."""
    for lock in list(_held.values()):
        with contextlib.suppress(OSError):
            os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
