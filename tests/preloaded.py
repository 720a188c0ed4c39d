"""A command whose process is forked from a parent that has its imports: see preload.py.

    python preloaded.py SOCKET ARGUMENTS    what stands for `dlmctl ARGUMENTS` in a line of shell

Each line starts it anew, so that it imports little.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

HANGS = 600.0
"""Seconds after which a process that a test waits for hangs: no sound one takes as long on a slow
machine that does much else, so that no test fails by the clock."""


class Command:
    """A command that runs; its process is `pid`.

    Args:
        address: socket of the parent.
        arguments: of `dlmctl`.
        descriptors: its standard input, output and error; the caller closes its own.
        directory, environment: None are the caller's.
    """

    def __init__(
        self,
        address: str,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        directory: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._parent = socket.socket(socket.AF_UNIX)
        self._parent.connect(address)
        socket.send_fds(self._parent, [b"\n"], list(descriptors))
        request = [
            list(arguments),
            os.fspath(directory or os.getcwd()),
            dict(environment or os.environ),
        ]
        self._parent.sendall(json.dumps(request).encode())
        self._parent.shutdown(socket.SHUT_WR)
        self._answers = self._parent.makefile("rb", buffering=0)  # none of it is out of sight
        self.pid = int(self._answers.readline())

    def send_signal(self, number: int) -> None:
        """To the process itself."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = HANGS) -> int:
        """Its exit code, or minus the signal that ended it.

        Raises:
            TimeoutError: it goes on; one may wait again.
        """
        if self.returncode is None:
            if not select.select([self._parent], [], [], timeout)[0]:
                raise TimeoutError
            self.returncode = int(self._answers.readline())
            self._parent.close()
        return self.returncode


def main(address: str, arguments: list[str]) -> None:
    """Run the command on our own descriptors, and end as it ends."""
    command = Command(address, arguments, [0, 1, 2])
    # The command has them now: a pipe is to end with it, whatever becomes of this process.
    os.close(0)
    os.close(1)
    code = command.wait(None)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
