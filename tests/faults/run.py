"""Faults by the hundred:

    python tests/faults/run.py --faults 240 --seed 0 [--job NAME] [--kind NAME] [--only NUMBER]

A JSON line for each fault, then a table; exit 1 where one failed. A failed one is had again by its
number: --only NUMBER with the same options.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import harness as faults  # noqa: E402
from jobs import JOBS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults at random moments of commands.")
    parser.add_argument("--faults", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", action="append", choices=JOBS)
    parser.add_argument("--kind", action="append", choices=faults.KINDS)
    parser.add_argument("--only", type=int, help="the number of one fault")
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    parser.add_argument("--minutes", type=float, default=1e9, help="end after so many")
    given = parser.parse_args()
    planned = faults.plan(given.faults, given.job or list(JOBS), given.kind or list(faults.KINDS))
    if given.only is not None:
        planned = [planned[given.only]]
    planned = planned[given.first :] if given.only is None else planned
    counts: Counter[tuple[str, bool]] = Counter()
    latencies = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing mounted
    deadline = time.monotonic() + 60 * given.minutes
    # In memory, where there is such a directory: a disk would have us wait for every fsync.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dlmctl-faults-", dir=memory) as place:
        made = faults.Harness(Path(place))
        if not faults.can_mount(made.place):
            print("no tmpfs can be mounted here: a full disk is a limit on the length of files",
                  file=sys.stderr)  # fmt: skip
        for number, job, kind in planned:
            if time.monotonic() > deadline:
                break
            row = {"fault": number, "job": job.name, "kind": kind}
            begun = time.monotonic()
            try:
                row |= made.fault(number, given.seed, job, kind)
                row["ok"] = True
            except Exception as error:
                row |= {"ok": False, "why": f"{type(error).__name__}: {error}"}
            row["seconds"] = round(time.monotonic() - begun, 2)
            if kind in ("int", "term") and "end" in row and row.get("hit"):
                latencies.append(row["end"] - row["waited"])
            counts[kind, row["ok"]] += 1
            print(json.dumps(row), flush=True)
    failed = sum(count for (_, ok), count in counts.items() if not ok)
    print(f"{'kind':10}{'passed':>8}{'failed':>8}", file=sys.stderr)
    for kind in faults.KINDS:
        print(f"{kind:10}{counts[kind, True]:8}{counts[kind, False]:8}", file=sys.stderr)
    print(f"{'all':10}{sum(counts.values()) - failed:8}{failed:8}", file=sys.stderr)
    if latencies:
        print(f"from signal to end, without waiting for a processor: at most "
              f"{max(latencies):.2f} s of {len(latencies)}", file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
