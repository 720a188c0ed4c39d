"""The parts of a dlmctl command as tasks of Ray, and their outputs put together.

    pip install ray
    python ray_shards.py -n 32 --gpus 1 -o samples.jsonl -- dlmctl rollout -q -n 8 prompts.jsonl

The command is one with --shard, --resume and -o, which are added. All machines see the same files.
Where a worker, its machine or the command is killed, Ray starts the task anew, and it goes on where
it was; where the command fails by itself, this ends with its exit code.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys

import ray

TRY_AGAIN = 75


class KilledError(Exception):
    """The command was ended by a signal, or another process still writes its file."""


def end_with_parent() -> None:
    """On Linux: no process goes on writing once its worker was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(command: list[str], directory: str) -> int:
    """Run a part; returns the exit code."""
    done = subprocess.run(
        command, cwd=directory, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent
    )
    if done.returncode < 0 or done.returncode == TRY_AGAIN:
        raise KilledError(f"{' '.join(command)}: {done.returncode}")
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--parts", type=int, required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--gpus", type=float, default=0, help="of a task")
    parser.add_argument("--cpus", type=float, default=1, help="of a task")
    parser.add_argument("--retries", type=int, default=3, help="of a task that was killed")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()

    ray.init()
    task = ray.remote(
        num_gpus=given.gpus,
        num_cpus=given.cpus,
        max_retries=given.retries,
        retry_exceptions=[KilledError],
    )(run)
    outputs, codes = [], []
    for number in range(1, given.parts + 1):
        shard = f"{number}/{given.parts}"
        outputs.append(f"{given.output}.{number}-of-{given.parts}")
        line = [*given.command, "--shard", shard, "--resume", "-o", outputs[-1]]
        codes.append(task.remote(line, os.getcwd()))
    if failed := max(ray.get(codes)):
        return failed
    with open(f"{given.output}.partial", "wb") as whole:
        for name in outputs:
            with open(name, "rb") as part:
                shutil.copyfileobj(part, whole)
    os.replace(f"{given.output}.partial", given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
