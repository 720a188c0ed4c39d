"""Locks between processes that end with their owner, even after kill -9.

A lock is `flock` on a file that is kept open: the kernel releases it when the last process that has
the file open is gone. Readers take no lock and wait for none. The package filelock does not fit: it
locks a file of its own next to the one that is renamed, falls back to files that outlive a kill,
and cannot say which process owns a lock.

On NFS, Linux emulates `flock` by byte-range locks, which clients of the same server see if it
serves locks (NFSv4, or lockd). If it does not, or under the mount option `local_lock`, machines do
not see each other's locks: then only one machine may write a directory.
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
    """A file that stays locked while this object, and the process that made it, live."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.owner = os.getpid()
        self._end = weakref.finalize(self, _close, descriptor, None, self.owner)

    def remove_with(self, path: Path) -> None:
        """Remove the file when the lock is released: it has no other purpose."""
        self._end.detach()
        self._end = weakref.finalize(self, _close, self.descriptor, path, self.owner)

    def release(self) -> None:
        """Release the lock now."""
        for identity, lock in list(_locks.items()):
            if lock is self:
                del _locks[identity]
        self._end()


_locks: weakref.WeakValueDictionary[tuple[int, int], Lock] = weakref.WeakValueDictionary()
"""The locks of this process, by device and inode."""


def hold(path: Path, what: str, signed: bool = False) -> Lock:
    """Lock a file, and create it if needed; the same process may lock it again.

    On a file system without locks, a line on standard error says so.

    Args:
        what: what is locked, for the message.
        signed: the file contains the owner's process id, for systems that do not tell it.

    Raises:
        TryAgainError: another process has the lock.
        CannotCreateError: the file cannot be created.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CannotCreateError(f"cannot create {path} ({error.strerror})") from None
        identity = _identity(os.fstat(descriptor))
        mine = _locks.get(identity)
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
                lock = _locks[identity] = Lock(descriptor)
                if signed:
                    os.ftruncate(descriptor, 0)
                return lock
        # Its last owner renamed or removed it after we opened and before we locked it.
        os.close(descriptor)


def hold_run(directory: Path) -> Lock:
    """The lock of a run directory, which must exist: its owner may train in it.

    Raises:
        TryAgainError: another process trains there.
    """
    path = directory / ".lock"
    lock = hold(path, str(directory), signed=True)
    lock.remove_with(path)
    with contextlib.suppress(OSError):  # a full disk: the lock works without its signature
        os.pwrite(lock.descriptor, f"{os.getpid()}\n".encode(), 0)
    return lock


def run_owner(directory: Path) -> int | None:
    """The process that trains in a run directory; None if there is none, as far as can be told.

    Takes no lock, so that it keeps no trainer from beginning.
    """
    try:
        with (directory / ".lock").open("rb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            number = _owner(inode) or _signature(stream.fileno())
        if number is not None:
            os.kill(number, 0)
    except PermissionError:
        return number
    except OSError:
        return None
    return number


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _owner(inode: int) -> int | None:
    """Process that has locked an inode, if the system tells (Linux, in the same container)."""
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
    if os.getpid() != owner:  # a forked child has already closed it
        return
    if path is not None:
        with contextlib.suppress(OSError):
            if _identity(path.stat()) == _identity(os.fstat(descriptor)):
                path.unlink()
    os.close(descriptor)


def _forget() -> None:
    """In a forked child: close the parent's locks, which must not outlive it through us."""
    for lock in list(_locks.values()):
        with contextlib.suppress(OSError):
            os.close(lock.descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_forget)
