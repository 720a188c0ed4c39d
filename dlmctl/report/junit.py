"""Results of `stats` as JUnit XML, which CI systems show.

A suite for each row of the statistics (a task) has the measures as properties, and a case for each
prompt: passed if more than half of its samples are right, else skipped, as pytest reports a failure
that was expected. A suite `compared` has the differences from a baseline, and the prompts that
were right there. What fails is a case of the suite `gates`, and nothing else, so that a build is
red if and only if the exit code is 1.

The format has no standard; this is the part that Jenkins' junit-10.xsd allows and GitLab, GitHub
actions and Azure read. Without times and host names the same records give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from dlmctl.records.files import write_file
from dlmctl.records.jsonl import Record, object_field
from dlmctl.report.comparison import Comparison, Pairs, changed
from dlmctl.report.gates import Gate
from dlmctl.report.measurements import is_measurement
from dlmctl.report.statistics import is_correct, label

LISTED = 1000
"""Most prompts with cases of their own, in a file; the rest is counted."""
LONGEST = 300
"""Most characters of a name or a message."""
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Outcome:
    """A prompt's samples in one row."""

    samples: int = 0
    right: int = 0
    why: str = ""
    """What the verifiers say of the first one that is wrong."""

    def add(self, record: Record) -> None:
        """Count a sample."""
        self.samples += 1
        if "error" in record:
            self.why = self.why or f"error: {record['error']}"
        elif is_correct(record):
            self.right += 1
        elif not self.why:
            verdicts = object_field(record, "verdict").values()
            whys = [v["why"] for v in verdicts if isinstance(v, dict) and v.get("why")]
            self.why = str(whys[0]) if whys else ""


class Report:
    """Takes records as they pass, then writes the file.

    Args:
        by: the field, or for measures the fields, whose values have rows of their own.
    """

    def __init__(self, by: str) -> None:
        self._by = by
        self._prompts: dict[tuple[str, str], Outcome] = {}
        """The first ones, by row and id."""
        self._others = 0
        """Samples of further prompts."""

    def seen(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, which are counted as they pass."""
        for number, record in enumerate(records):
            if not is_measurement(record):
                key = label(record, self._by), str(record.get("id", f"record-{number}"))
                if key in self._prompts or len(self._prompts) < LISTED:
                    self._prompts.setdefault(key, Outcome()).add(record)
                else:
                    self._others += 1
            yield record

    def write(
        self,
        path: Path,
        rows: Sequence[Mapping[str, Any]],
        gates: Sequence[Gate],
        compared: Sequence[Mapping[str, Any]] = (),
        comparison: Comparison | None = None,
    ) -> None:
        """Write the file; raises CannotCreateError."""
        root = Element("testsuites", name="dlmctl stats")
        pairs = comparison.pairs if comparison else None
        if gates:
            _gates(root, gates, pairs)
        if pairs:
            _compared(root, compared, pairs)
        for row in rows:
            fields = ["task"] if "task" in row else self._by.split(",")
            name = " ".join(str(row.get(field, "")) for field in fields)
            suite = _suite(root, name, row)
            for (task, identity), outcome in self._prompts.items():
                if task == row.get("task"):
                    _prompt(suite, task, identity, outcome)
            if row is rows[-1] and self._others:
                said = f"not listed: {self._others} samples of further prompts"
                SubElement(suite, "system-out").text = said
        _count_cases(root)
        ElementTree.indent(root)
        write_file(path, ElementTree.tostring(root, "utf-8", xml_declaration=True) + b"\n")


def _gates(root: Element, gates: Sequence[Gate], pairs: Pairs | None) -> None:
    suite = _suite(root, "gates", {})
    for gate in gates:
        case = _case(suite, "gates", gate.name)
        if gate.passed:
            SubElement(case, "system-out").text = _clean(gate.said)
        else:
            failure = SubElement(case, "failure", type="gate", message=_clean(gate.said))
            failure.text = _clean(_lost(pairs), None)


def _compared(root: Element, comparison: Sequence[Mapping[str, Any]], pairs: Pairs) -> None:
    shown = {
        f"{row['task']}.{row['measure']}.{name}": row[name]
        for row in comparison
        for name in ("baseline", "value", "difference", "interval", "p", "change")
    }
    lacking = {
        "unpaired.baseline": len(pairs.only_baseline),
        "unpaired.records": len(pairs.only_compared),
        "unpaired.samples": pairs.samples,
    }
    suite = _suite(root, "compared", {**shown, **lacking})
    lost, _ = changed(pairs.pairs)
    for pair in lost[:LISTED]:
        case = _case(suite, f"compared.{pair.key[0]}", str(pair.key[1]))
        SubElement(case, "skipped", type="lost", message="right in the baseline, and not any more")
    if len(lost) > LISTED:
        said = f"not listed: {len(lost) - LISTED} further prompts"
        SubElement(suite, "system-out").text = said


def _lost(pairs: Pairs | None) -> str:
    lost = changed(pairs.pairs)[0] if pairs else []
    names = ", ".join(str(pair.key[1]) for pair in lost[:LISTED])
    return f"right in the baseline, and not any more ({len(lost)}): {names}" if lost else ""


def _prompt(suite: Element, task: str, identity: str, outcome: Outcome) -> None:
    case = _case(suite, task, identity)
    if 2 * outcome.right > outcome.samples:
        return
    said = [f"{outcome.right} of {outcome.samples} samples are right", outcome.why]
    SubElement(case, "skipped", type="wrong", message=_clean(": ".join(filter(None, said))))


def _suite(root: Element, name: str, measures: Mapping[str, Any]) -> Element:
    suite = SubElement(root, "testsuite", name=_clean(name))
    shown = {key: value for key, value in measures.items() if value is not None}
    if shown:
        properties = SubElement(suite, "properties")
        for key, value in shown.items():
            SubElement(properties, "property", name=_clean(key), value=_clean(str(value)))
    return suite


def _case(suite: Element, group: str, name: str) -> Element:
    return SubElement(suite, "testcase", classname=_clean(group), name=_clean(name), time="0")


def _count_cases(root: Element) -> None:
    """Say in suites, and in the root, how many cases there are and how they turned out."""
    for element in (root, *root):
        kinds = {
            "tests": "testcase",
            "failures": "failure",
            "errors": "error",
            "skipped": "skipped",
        }
        for name, tag in kinds.items():
            # junit-10.xsd has no `skipped` in the root.
            if element is not root or name != "skipped":
                element.set(name, str(sum(1 for _ in element.iter(tag))))
        element.set("time", "0")


def _clean(text: str, longest: int | None = LONGEST) -> str:
    """Text that XML can hold, cut to a length; other characters become U+FFFD."""
    return NOT_XML.sub("\ufffd", text)[:longest]
