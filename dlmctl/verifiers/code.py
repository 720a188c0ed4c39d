"""Verifier `code`: tests of generated Python, as in HumanEval, MBPP, APPS and LiveCodeBench.

    tests       assertions, a list of texts or one text that runs as one test; also `test_list`
                (MBPP) and `test` (HumanEval), whose `check` is called with `entry_point`;
                or inputs and outputs, of a program that reads and prints: see `stdio`
    setup       texts that run before: `test_setup_code`, `test_imports`
    prompt      put in front if it begins the function of `entry_point`

Assertions run in the interpreter of the code that they test. The report has a token, so that
printing and exiting early gain nothing. But code that sets out to can find the token in memory,
replace functions that tests use, or return objects that equal everything. Programs that
read and print share no process with what they are expected to print.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.verifiers.answer import Verdict, completion_text, judged
from dlmctl.verifiers.sandbox import Code, Report, run_code
from dlmctl.verifiers.stdio import Case, agrees, cases

TIME_LIMIT = 10.0
MEMORY_LIMIT = 1 << 30
FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)")
PYTHON = {"python", "python3", "py"}
LONGEST_TEST = 200
"""Most characters of a failed test in the verdict."""
SPARE = 1 << 16
"""Bytes that a program may print beyond twice what is expected."""

_warned = False


def code(
    record: Mapping[str, Any],
    time_limit: float = TIME_LIMIT,
    memory: int = MEMORY_LIMIT,
    unconfined: bool = False,
) -> Verdict:
    """1 if every test passes.

    Args:
        time_limit: seconds for the code and all of its tests together.
        memory: bytes of address space.
        unconfined: run the code even if the kernel cannot deny it files and network.

    Raises:
        DataError: the record has no tests, or they have another form.
        UnavailableError: the code cannot be confined here.
    """
    expected = cases(record)
    program = _reading(record, expected) if expected else _program(record)
    report = run_code(program, time_limit, memory, unconfined)
    if report.lacking:
        _unconfined(report.lacking, unconfined)
    total = len(expected or program.tests)
    results = [report.steps.get(str(number), "") for number in range(total)]
    if expected:
        results = [_printed(*pair) for pair in zip(results, expected, strict=True)]
    loaded = "load" in report.steps and report.steps["load"] is None
    passed = sum(result is None for result in results) if loaded else 0
    detail: dict[str, Any] = {"passed": passed, "total": total}
    if report.lacking:
        detail["confined"] = False
    correct = passed == total and not report.why
    return judged(correct, "" if correct else _why(program, report, results), **detail)


def extract_code(text: str) -> str:
    """The code of a completion: its last fence of Python, else its last fence, else all of it."""
    return fenced(text, PYTHON)


def fenced(text: str, languages: Collection[str]) -> str:
    """The last fence in one of these languages, else the last fence, else the whole text.

    An unclosed fence reaches to the end.
    """
    fences: list[tuple[str, list[str]]] = []
    within = False
    for line in text.splitlines(keepends=True):
        fence = FENCE.match(line)
        if fence is None:
            if within:
                fences[-1][1].append(line)
        elif within:
            within = False
        else:
            within = True
            fences.append((fence[1].lower(), []))
    preferred = [lines for language, lines in fences if language in languages]
    chosen = preferred or [lines for _, lines in fences]
    return "".join(chosen[-1]) if chosen else text


def _program(record: Mapping[str, Any]) -> Code:
    entry = record.get("entry_point")
    if entry is not None and not (isinstance(entry, str) and entry.isidentifier()):
        raise DataError(f"entry_point {str(entry)[:80]!r} is not the name of a function")
    named = [name for name in ("tests", "test_list", "test") if record.get(name)]
    if not named:
        raise DataError(
            "there are no tests: expected field 'tests' (a list of assertions or of objects with "
            "'input' and 'output', or Python), 'test_list', 'test' or 'input_output'"
        )
    tests = _texts(named[0], record[named[0]])
    if entry:
        called = f"\ncheck({entry})\n"
        tests = [t + called if re.search(r"^def check\b", t, re.MULTILINE) else t for t in tests]
    setup = _setup(record)
    whole = completion_text(record)
    source, before = extract_code(whole), ""
    prompt = record.get("prompt")
    if entry and isinstance(prompt, str):
        start = re.search(rf"^(?:async )?def {entry}\b", prompt, re.MULTILINE)
        if start and re.search(rf"^(?:async )?def {entry}\b", source, re.MULTILINE):
            before = prompt[: start.start()]  # imports and helpers
        elif start:
            source = prompt + source
    return Code(before, setup, source, tests)


def _setup(record: Mapping[str, Any]) -> list[str]:
    names = ("test_imports", "test_setup_code")
    return [text for name in names for text in _texts(name, record.get(name) or [])]


def _reading(record: Mapping[str, Any], expected: Sequence[Case]) -> Code:
    """The completion as a program, and what it reads."""
    source = extract_code(completion_text(record))
    sizes = [SPARE + 2 * len(case.expected.encode("utf-8", "replace")) for case in expected]
    return Code("", _setup(record), source, [], [case.given for case in expected], sizes)


def _printed(result: Any, case: Case) -> str | None:
    """What is wrong with what a program printed; empty if the step was not reached."""
    if not result:
        return ""
    if result["why"]:
        return str(result["why"])
    if agrees(result["output"], case.expected):
        return None
    printed, expected = (
        repr(text.strip()[: LONGEST_TEST // 2]) for text in (result["output"], case.expected)
    )
    return f"printed {printed} instead of {expected}"


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"field '{name}' is neither Python nor a list of it")
    return texts


def _why(program: Code, report: Report, results: list[str | None]) -> str:
    if load := report.steps.get("load"):
        return load
    for test, result in zip(program.inputs or program.tests, results, strict=True):
        if result and program.inputs:
            return f"{result} for {test.strip()[:LONGEST_TEST]!r}"
        if result:
            return f"{result} in {test.strip()[:LONGEST_TEST]}"
    return report.why or "not all tests were reached"


def _unconfined(lacking: str, allowed: bool) -> None:
    """Say once that code runs unconfined, or refuse to run it."""
    global _warned
    if not allowed:
        raise UnavailableError(
            f"code cannot be confined here ({lacking}), and was not run: use Linux 5.13 or newer, "
            "or give --allow-unconfined within a container or virtual machine that may break"
        )
    if not _warned:
        print(
            f"dlmctl: code runs unconfined ({lacking}): it reaches files, network and processes",
            file=sys.stderr,
        )
        _warned = True
