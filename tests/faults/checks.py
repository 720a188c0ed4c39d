"""What holds of outputs: they are whole, and those of an undisturbed run."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

from jobs import Job

Trees = dict[str, bytes]
"""Contents by name; links by where they point."""
TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")
"""Fields of metrics that differ from run to run."""


def check_whole(directory: Path) -> None:
    """Records are whole but for a last line in the making, and what is published is whole."""
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue  # in the making
        data = path.read_bytes()
        if ".jsonl" in path.name:
            for line in data.splitlines(keepends=True):
                if line.endswith(b"\n"):
                    assert isinstance(json.loads(line), dict), f"{name}: {line!r}"
                else:
                    assert name.endswith(".partial"), f"{name} has half a line"
        elif path.suffix == ".json":
            json.loads(data)
        elif path.suffix == ".safetensors":
            _check_tensors(name, data)
        elif path.suffix == ".png":
            assert data[:4] + data[-8:] == b"\x89PNGIEND\xaeB`\x82", name


def _check_tensors(name: str, data: bytes) -> None:
    """The file is as long as its header says."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    ends = [part["data_offsets"][1] for key, part in header.items() if key != "__metadata__"]
    assert len(data) == 8 + size + max(ends, default=0), f"{name} is cut off"


def tree(directory: Path, job: Job) -> Trees:
    """The outputs of a job, as far as they are the same each time."""
    found: Trees = {}
    newest = _target(directory.parent / job.run / "latest") if job.newest else ""
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = _target(path).encode()
            continue
        older = job.newest and "/step-" in name and f"/{newest}/" not in name
        if older or path.is_dir() or path.name == ".lock":
            continue
        found[name] = path.read_bytes()
        if path.name == "metrics.jsonl":
            found[name] = _without_times(found[name])
    return found


def _target(link: Path) -> str:
    return os.readlink(link) if link.is_symlink() else ""


def _without_times(data: bytes) -> bytes:
    kept = []
    for line in data.splitlines():
        with suppress(ValueError):  # a last line that was cut off
            record = json.loads(line)
            kept.append(json.dumps({k: v for k, v in record.items() if k not in TIMES}))
    return "\n".join(kept).encode()


def differences(found: Trees, wanted: Trees) -> list[str]:
    """What one has and the other has not, or otherwise."""
    names = sorted(found.keys() | wanted.keys())
    return [
        f"{name}: "
        + ("missing" if name not in found else "too much" if name not in wanted else "other bytes")
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def steps_once(metrics: Path, fields: tuple[str, ...]) -> None:
    """Each step has one record."""
    records = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    counts = Counter(tuple(record[field] for field in fields) for record in records)
    assert set(counts.values()) == {1}, f"steps more than once: {counts}"
