"""What the kernel tells of a process (Linux)."""

from __future__ import annotations

import signal
import time
from pathlib import Path


def wait_for_handler(pid: int, longest: float) -> None:
    """Until a process has a handler of SIGTERM, or is gone."""
    deadline = time.monotonic() + longest
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        caught = next((s for s in status.splitlines() if s.startswith("SigCgt")), "SigCgt: 0")
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


class Waits:
    """Seconds that a process, and we who look at it, had to wait for a processor (Linux)."""

    def __init__(self, pid: int) -> None:
        self.paths = [Path(f"/proc/{pid}/task"), Path("/proc/self/task")]
        self.begun = [self._now(path) for path in self.paths]
        self.last = list(self.begun)

    def look(self) -> None:
        for n, path in enumerate(self.paths):
            self.last[n] = {**self.last[n], **self._now(path)}

    def seconds(self) -> float:
        self.look()
        return (
            sum(
                max((now - begun.get(task, 0) for task, now in last.items()), default=0)
                for begun, last in zip(self.begun, self.last, strict=True)
            )
            / 1e9
        )

    def _now(self, path: Path) -> dict[str, int]:
        found = {}
        try:
            for task in path.iterdir():
                found[task.name] = int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):
            pass
        return found
