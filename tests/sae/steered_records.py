"""Records of steered completions and their twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from dlmctl.records.jsonl import Record
from dlmctl.sae.steering.twins import (
    Treatment,
    Twins,
    read_baseline,
    read_sampled_text,
    read_twins,
)

FIRST = Treatment("saes/a", 3, 7, 2.0, "all", None)


def completion(number: int, sample: int, text: str, *steers: Treatment, **more: Any) -> Record:
    made: dict[str, Any] = {"seed": 1, "revision": "r", "temperature": 0.9}
    if steers:
        made["steer"] = [steer.fields() for steer in steers]
    fields = {"id": f"p{number}", "sample": sample, "prompt": "01", "completion": text}
    return Record({**fields, "tokens": {"prompt": [3, 4]}, "rollout": made, **more})


def twins(*treatments: Treatment, count: int = 2) -> list[Twins]:
    plain = [completion(n, 0, f"plain{n}") for n in range(count)]
    steered = [
        completion(n, 0, f"{t.feature}-{t.amplitude}-{n}", t)
        for t in treatments
        for n in range(count)
    ]
    for number, record in enumerate([*plain, *steered]):
        record.where = f"f:{number}"
    return list(read_twins(steered, read_baseline(plain, read_sampled_text), read_sampled_text))


def written(path: Path, records: list[Record]) -> str:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return str(path)
