"""Readers of records: JSONL, tables, columns, verifiers, groups, reports, options."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mutations import mutate_bytes, mutate_json, mutate_text
from target import Target

from dlmctl.records.errors import UserFacingError
from dlmctl.records.groups import group_batches, groups
from dlmctl.records.jsonl import Record, dump, parse_record, read_records
from dlmctl.rl.batches import whole_batches
from dlmctl.settings.report import Curves
from dlmctl.settings.verify import Judging
from dlmctl.verifiers import registry, vqa
from dlmctl.verifiers.evaluations import from_evaluation

GRID = "1234341221434321"
LAYOUT = "<description>red circle in row 1, column 1</description> <think>one</think> \\boxed{1}"
D1 = "<reasoning>\n1+2=3\n</reasoning>\n<answer>\n\\boxed{3}\n</answer>"
THING = {"colour": "red", "shape": "circle", "row": 1, "column": 1}
COUNTDOWN = {"numbers": [3, 5, 7], "target": 22, "task": "countdown"}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "sudoku": [
        {"puzzle": "0" * 8 + GRID[8:], "solution": GRID, "completion": GRID, "task": "sudoku"},
        {"puzzle": GRID, "completion": "so 1 2 3 4 | 3 4 1 2 | 2 1 4 3 | 4 3 2 1 it is"},
    ],
    "countdown": [
        {**COUNTDOWN, "completion": "<answer>3*5+7</answer>"},
        {**COUNTDOWN, "completion": "\\boxed{\\frac{3}{5} \\times 7 = 22}"},
        {**COUNTDOWN, "numbers": ["3", 5], "target": "1/3", "completion": "it is (3+5)/7 = 2."},
    ],
    "concepts": [
        {"wanted": {"sentiment": "positive"}, "completion": "What a wonderful week ago."},
        {"wanted": {"tense": "past", "number": "plural"}, "completion": "The dogs were great."},
    ],
    "vqa": [
        {"answer": "two", "completion": "\\boxed{2}", "task": "vqa"},
        {
            "answers": [{"answer": "1,000"}, {"answer": "3/4"}],
            "completion": "<answer>0.75</answer>",
        },
        {"answers": ["cat"] * 10, "completion": "a cat."},
        {"answer": "A", "completion": "(A) because"},
    ],
    "layout": [{"completion": LAYOUT, "scene": [THING], "answer": "1", "task": "shapes"}],
    "gsm8k": [
        {"answer": "1,234.5", "completion": "so #### 1234.50", "task": "gsm8k"},
        {"answer": "3", "completion": D1},
        {"answer": "\\frac{3}{4}", "completion": "it is 1 \\frac{3}{4} = 7/4 \\text{cm}"},
    ],
    "choice": [
        {"answer": "B", "completion": "The answer is (B)."},
        {"answer": "C", "completion": "C"},
        {"answer": 1, "choices": ["Rome", "Paris"], "completion": "The answer is Paris."},
    ],
    "exact": [{"answer": "x", "completion": "<answer> x </answer>", "task": "canaries"}],
    "tags": [{"answer": "3", "completion": D1, "task": "gsm8k"}],
    "math": [{"answer": "\\frac12", "completion": "\\boxed{0.5}", "task": "math"}],
    "code": [
        {"tests": ["assert f() == 1"], "completion": "```python\ndef f():\n    return 1\n```"}
    ],
    "d1": [
        {"task": "sudoku", "question": f"solve {GRID}", "generation": D1, "ground_truth": GRID},
        {"task": "countdown", "generations": D1, "ground_truth": [[1, 2], 3]},
        {"task": "gsm8k", "generation": D1, "ground_truth": None},
    ],
}
OF = {
    "sudoku-units": "sudoku",
    "sudoku-cells": "sudoku",
    "countdown-shaped": "countdown",
    "countdown-steps": "countdown",
    "grounding": "layout",
    "format": "tags",
    "tags-count": "tags",
    "tags-soft": "tags",
    "tags-strict": "tags",
    "boxed-tags": "tags",
    "integer": "exact",
}
"""Verifiers that begin with the records of another."""
PROCESSES = ("math", "code", "regex", "json-schema", "judge", "reward-model")
"""Verifiers that have processes, servers, models or optional packages; the part of `vqa` that asks
`math` is left out."""
ROLLOUT = {
    "id": "a",
    "sample": 0,
    "rollout": {"round": 1, "samples": 2, "round_size": 2, "model": "m", "length": 2},
    "tokens": {"prompt": [1], "completion": [1, 2, 3]},
    "weights": [0.5, None, 1],
    "reward": 1.0,
    "rewards": {"x": 1.0},
    "verdict": {"x": {"correct": True, "why": ""}},
    "advantage": 0.5,
    "prompt": "p",
    "images": ["a.png"],
}


def _lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _jsonl(data: bytes, folder: Path) -> None:
    path = folder / "in.jsonl"
    path.write_bytes(data)
    for on_error in ("keep", "fail"):
        for record in read_records([str(path)], on_error):  # type: ignore[arg-type]
            dump(record)


def _record(data: bytes, folder: Path) -> None:
    dump(parse_record(data, "in.jsonl:1"))


@contextlib.contextmanager
def _without_math() -> Iterator[None]:
    """`vqa` without the part that asks the process of `math`."""
    there, vqa._has_math = vqa._has_math, lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        vqa._has_math = there


@contextlib.contextmanager
def _without_processes() -> Iterator[None]:
    """The stage with verifiers of 0 for those that have processes."""
    there = registry.find_verifier
    registry.find_verifier = (  # type: ignore[assignment]
        lambda name: (lambda record: 0.0) if name in PROCESSES else there(name)
    )
    try:
        yield
    finally:
        registry.find_verifier = there


def _verifier(name: str, data: bytes, folder: Path) -> None:
    record = from_evaluation(parse_record(data, "in.jsonl:1"))
    with _without_math():
        verdict = registry.ask(registry.find_verifier(name), record)
    dump({"reward": verdict.reward, "detail": verdict.detail})


def _limited(function: Callable[..., Any], data: bytes, folder: Path) -> None:
    verdict = function(parse_record(data, "in.jsonl:1"), time_limit=0.5)
    dump({"reward": verdict.reward, "detail": verdict.detail})


def _verify(data: bytes, folder: Path) -> None:
    """The stage, by the task of the record, without the verifiers that have processes."""
    record = parse_record(data, "in.jsonl:1")
    for preset in (None, "d1"):
        try:
            with _without_math(), _without_processes():
                for done in registry.verify([Record(record)], judging=Judging(preset=preset)):
                    dump(done)
        except UserFacingError:
            if preset:
                raise


def _rows(suffix: str, data: bytes, folder: Path) -> None:
    from dlmctl.tasks.columns import to_record
    from dlmctl.tasks.readers import read_rows

    path = folder / f"in{suffix}"
    path.write_bytes(data)
    refused: UserFacingError | None = None
    for row in read_rows(str(path), "train", None, "skip"):
        try:
            dump(to_record(row, {}, None, "plain"))
            dump(to_record(row, {"prompt": next(iter(row), "x")}, "sudoku", "d1"))
        except UserFacingError as error:
            refused = error
    if refused:
        raise refused


def _columns(data: bytes, folder: Path) -> None:
    from dlmctl.tasks.columns import to_record

    row = parse_record(data, "in.jsonl:1")
    dump(to_record(row, {}, None, "plain"))


def _groups(data: bytes, folder: Path) -> None:
    path = folder / "in.jsonl"
    path.write_bytes(data)
    list(groups(read_records([str(path)], "keep")))
    list(group_batches(read_records([str(path)], "keep"), 2))
    list(whole_batches(read_records([str(path)], "keep"), 2, cut_rounds=True))


def _stats(data: bytes, folder: Path) -> None:
    from dlmctl.report.measurements import averages, is_measurement, present
    from dlmctl.report.statistics import tally

    path = folder / "in.jsonl"
    path.write_bytes(data)
    records = list(read_records([str(path)], "keep"))
    if records and is_measurement(records[0]):
        dump(averages(records, present(records[0])))
    dump(tally(records, "task", (1, 2), 0.95))


def _view(data: bytes, folder: Path) -> None:
    from rich.console import Console

    from dlmctl.report.completions import completions
    from dlmctl.report.token_lines import completion_lines
    from dlmctl.report.token_page import write_page

    def spell(model: str) -> Callable[[Any], list[str]]:
        return lambda ids: [f"<{token}>" for token in ids]

    path = folder / "in.jsonl"
    path.write_bytes(data)
    shown = list(completions(read_records([str(path)], "keep"), spell, on_error="keep"))
    write_page(shown, folder / "page.html")
    list(completion_lines(shown, Console(file=io.StringIO(), width=80)))
    list(completions(read_records([str(path)], "keep"), spell))


def _curves(data: bytes, folder: Path) -> None:
    from dlmctl.report.plots import averaged, collect, smoothed

    path = folder / "in.jsonl"
    path.write_bytes(data)
    panels = collect(read_records([str(path)], "keep"), Curves(["reward", "weights"]))
    for series, _ in panels.values():
        for points in series.values():
            smoothed([mean for _, mean, _ in averaged(points)], 3)


def _options(data: bytes, folder: Path) -> None:
    """What parses the text of an option."""
    from dlmctl.distill.image_sets import read_about
    from dlmctl.settings.layout import Tags
    from dlmctl.settings.parsing import (
        byte_count,
        named_number,
        named_text,
        whole_numbers,
        whole_range,
    )
    from dlmctl.settings.steering import Steering

    text = data.decode("utf-8", "replace")
    parsers: tuple[Callable[[], Any], ...] = (
        lambda: whole_numbers("--k", text),
        lambda: byte_count("--memory", text),
        lambda: Tags(text),
        lambda: named_number("--weight", text, "NAME=NUMBER"),
        lambda: named_text("--map", text, "FIELD=COLUMN"),
        lambda: whole_range("--holes", text, 1, 12),
        lambda: Steering([text]),
        lambda: Steering(["sae:0=1"], steer_time=text),
        lambda: registry.find_verifier(text),
        lambda: read_about(text),
    )
    refused: UserFacingError | None = None
    for parse in parsers:
        try:
            parse()
        except UserFacingError as error:
            refused = error
    if refused:
        raise refused


def _text(data: bytes, draw: Any) -> bytes:
    return mutate_text(data.decode("utf-8", "replace"), draw).encode()


def _rows_seeds() -> list[bytes]:
    return [
        b'id,question,answer\n1,"What, is 1+1?",so #### 2\n2,x,y\n',
        f"Puzzle,Solution\n{'0' * 8 + GRID[8:]},{GRID}\n".encode(),
        b'input,output\n"30,100,93",23\n',
        b"nums,target\n12,23\n",
        b"problem,solution,image\np,\\boxed{1},a.png\n",
        b"prompt\ttask\nhello\tx\n",
    ]


def _parquet_seeds() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    columns = {
        "question": ["q"],
        "answer": ["#### 1"],
        "nums": [[1, 2]],
        "image": [{"bytes": b"x"}],
    }
    parquet.write_table(pyarrow.table(columns), sink)
    return [sink.getvalue().to_pybytes()]


COLUMNS = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "image": "a.png"},
    {"prompt": [{"role": "user", "content": "a"}], "data_source": "x/y", "id": 3},
    {"prompt": "p", "reward_model": {"ground_truth": "1"}, "data_source": "openai/gsm8k"},
    {"Puzzle": "0" * 8 + GRID[8:], "Solution": GRID},
    {"input": "30,100,93", "output": "23"},
    {"nums": [1, 2], "target": 3},
    {"problem": "p <image>", "images": [{"bytes": None, "path": "a.png"}], "answer": "1"},
    {"question": "q", "answer": "a #### 1,000"},
    {"problem": "p", "solution": "\\boxed{1}"},
    {"question": "q"},
]


def record_targets() -> list[Target]:
    """Those that cost little and get most of the inputs."""
    made = [
        Target("record", [*map(_lines, (ROLLOUT, *COLUMNS))], _record, mutate_json, 10),
        Target("jsonl", [_lines(ROLLOUT, ROLLOUT), b"\n", b'{"a":1}'], _jsonl, mutate_bytes, 6),
        Target("verify", [_lines(r) for rs in RECORDS.values() for r in rs],
               _verify, mutate_json, 8),
        Target("columns", [*map(_lines, COLUMNS)], _columns, mutate_json, 6),
        Target("csv", _rows_seeds(), partial(_rows, ".csv"), mutate_bytes, 4),
        Target("tsv", _rows_seeds(), partial(_rows, ".tsv"), _text, 2),
        Target("groups", [_lines(ROLLOUT, ROLLOUT)], _groups, _each_line, 3),
        Target("stats", [_lines(ROLLOUT, {**ROLLOUT, "id": 2}), _lines({"layer": 1, "x": 2.0})],
               _stats, _each_line, 3),
        Target("view", [_lines(ROLLOUT, ROLLOUT)], _view, _each_line, 1),
        Target("plot", [_lines({"step": 1, "reward": 0.5, "weights": [1, 2]}, {"step": 2})],
               _curves, _each_line, 2),
        Target("options", [b"2,4,8", b"512M", b"a=0.5", b"sae@3:17=2.5", b"0.5-1", b"m:f"],
               _options, _text, 4, imports=True),
    ]  # fmt: skip
    for name in registry.VERIFIERS:
        if name not in PROCESSES:
            seeds = [_lines(r) for r in [*RECORDS[OF.get(name, name)], *RECORDS["tags"]]]
            made.append(Target(name, seeds, partial(_verifier, name), _completion, 4))
    return made


def process_targets() -> list[Target]:
    """Those that ask another process, or read with a library that is slow to start."""
    from dlmctl.verifiers.code import code
    from dlmctl.verifiers.mathematics import math

    made = [
        Target(name, [_lines(r) for r in RECORDS[name.partition("-")[0]]],
               partial(_limited, function), _completion, 0.003, starts=True, imports=True, wall=30)
        for name, function in (("math", math), ("code", code), ("vqa-math", vqa.vqa))
    ]  # fmt: skip
    parquet = partial(_rows, ".parquet")
    return [*made, Target("parquet", _parquet_seeds, parquet, mutate_bytes, 0.2, imports=True)]


def _completion(data: bytes, draw: Any) -> bytes:
    """Mostly another completion, since it is what a model writes; else another record."""
    if draw.random() < 0.3:
        return mutate_json(data, draw)
    try:
        record = json.loads(data)
        if not isinstance(record["completion"], str):
            return mutate_json(data, draw)
        record["completion"] = mutate_text(record["completion"], draw)
        return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, KeyError, RecursionError):
        return mutate_json(data, draw)


def _each_line(data: bytes, draw: Any) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join(mutate_json(x, draw) if x and draw.random() < 0.7 else x for x in lines)
