"""JUnit XML: its structure, and texts that XML cannot hold."""

from collections import Counter
from xml.etree import ElementTree

import pytest
from conftest import invoke

from dlmctl.records.jsonl import dump
from dlmctl.report import junit

COUNTS = {"tests", "failures", "errors", "time"}
SUITE = {*COUNTS, "skipped"}
SCHEMA = {
    "testsuites": ({"name"}, COUNTS, ["testsuite*"]),
    "testsuite": ({"name", "tests"}, SUITE, ["properties?", "testcase*", "system-out?"]),
    "properties": (set(), set(), ["property*"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": ({"name", "classname"}, {"time"}, ["skipped?", "failure?", "system-out?"]),
    "skipped": (set(), {"type", "message"}, []),
    "failure": (set(), {"type", "message"}, []),
    "system-out": (set(), set(), []),
}  # fmt: skip
"""Of junit-10.xsd of Jenkins, for the elements that are written: attributes that are required and
allowed, and children in their order. The schema also allows any order of a case's children."""
HOSTILE = [
    "]]><failure/>",
    "<!DOCTYPE x [<!ENTITY a 'b'>]>&a;&lt;",
    "\x00\x01\x1b[31m\x7f\x85\ufffe\uffff",
    "\"quoted\" 'twice' \n\r\t end",
    "Ω 𝔸 العربية",
    "x" * 100_000,
]


def check(element):
    """That an element and what is in it are as the schema has them."""
    required, allowed, children = SCHEMA[element.tag]
    assert required <= set(element.keys()) <= required | allowed
    places = [name.rstrip("*?") for name in children]
    found = [places.index(child.tag) for child in element]
    assert found == sorted(found)
    for name, count in Counter(child.tag for child in element).items():
        assert count == 1 or f"{name}*" in children
    if len(element):
        assert not (element.text or "").strip()
    for child in element:
        check(child)


def report(tmp_path, records, *options):
    (tmp_path / "v.jsonl").write_bytes(b"".join(map(dump, records)))
    result = invoke("stats", tmp_path / "v.jsonl", "--junit", tmp_path / "r.xml", *options)
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    check(root)
    for element in (root, *root):
        tags = Counter(inner.tag for inner in element.iter())
        assert int(element.get("tests")) == tags["testcase"]
        assert int(element.get("failures")) == tags["failure"]
        assert int(element.get("skipped", tags["skipped"])) == tags["skipped"]
    assert bool(int(root.get("failures"))) == (result.exit_code == 1)
    return result, {suite.get("name"): suite for suite in root}


def record(identity, *rewards, task="t", why=""):
    verdicts = [{"x": {"correct": bool(r), **({} if r else {"why": why})}} for r in rewards]
    return [
        {"id": identity, "task": task, "sample": s, "reward": float(r), "verdict": v}
        for s, (r, v) in enumerate(zip(rewards, verdicts, strict=True))
    ]


def test_a_suite_has_measures_and_prompts_and_only_gates_fail(tmp_path):
    records = record("a", 1) + record("b", 0, why="no 3 in row 2") + record(3, 1, 0, task="u")
    result, suites = report(
        tmp_path, records, "--fail-under", "accuracy=0.4", "--fail-under", "pass@1=0.9"
    )
    assert result.exit_code == 1
    assert list(suites) == ["gates", "t", "u", "all"]
    cases = {case.get("name"): case for case in suites["gates"].iter("testcase")}
    assert cases["accuracy >= 0.4"].find("failure") is None
    assert cases["pass@1 >= 0.9"].find("failure").get("message") == "pass@1 is 0.5, under 0.9"
    shown = {p.get("name"): p.get("value") for p in suites["t"].iter("property")}
    assert (shown["accuracy"], shown["prompts"]) == ("0.5", "2")
    said = {c.get("name"): c.find("skipped") for s in "tu" for c in suites[s].iter("testcase")}
    assert said["a"] is None
    assert said["b"].get("message") == "0 of 1 samples are right: no 3 in row 2"
    assert said["3"].get("message").startswith("1 of 2 samples are right")


def test_prompts_that_were_right_are_named(tmp_path):
    before = [row for n in range(20) for row in record(f"p{n}", 1)]
    (tmp_path / "b.jsonl").write_bytes(b"".join(map(dump, before)))
    after = [row for n in range(20) for row in record(f"p{n}", n < 9)]
    result, suites = report(
        tmp_path, after, "--compare", tmp_path / "b.jsonl", "--fail-worse", "accuracy"
    )
    assert result.exit_code == 1
    failure = suites["gates"].find("testcase/failure")
    assert "accuracy is significantly worse" in failure.get("message")
    assert "(11): p10, p11, " in failure.text
    lost = [case.get("name") for case in suites["compared"].iter("testcase")]
    assert sorted(lost) == sorted(f"p{n}" for n in range(9, 20))
    shown = {p.get("name"): p.get("value") for p in suites["compared"].iter("property")}
    assert (shown["t.accuracy.change"], shown["unpaired.records"]) == ("worse", "0")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(tmp_path, text):
    records = [
        *record(text, 0, task=text, why=text),
        {"id": text, "task": text, "error": {"message": text}},
    ]
    _, suites = report(tmp_path, records, "--fail-under", "accuracy=0")
    shown = junit.NOT_XML.sub("\ufffd", text)[: junit.LONGEST]
    [case] = suites[shown].iter("testcase")
    assert case.get("name") == case.get("classname") == shown
    message = case.find("skipped").get("message")
    assert message == f"0 of 2 samples are right: {shown}"[: junit.LONGEST]
    assert (tmp_path / "r.xml").stat().st_size < 20_000


def test_characters_are_those_of_xml():
    """Section 2.2 of XML 1.0: #x9 | #xA | #xD | [#x20-#xD7FF] | [#xE000-#xFFFD] | beyond."""
    for code in range(0x11000):
        held = code in (9, 10, 13) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD
        assert bool(junit.NOT_XML.match(chr(code))) == (not held and code < 0x10000)


def test_a_file_lists_so_many_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(junit, "LISTED", 5)
    records = [row for n in range(8) for row in record(f"p{n}", 0, 1)]
    _, suites = report(tmp_path, records)
    assert len(list(suites["t"].iter("testcase"))) == 5
    assert suites["t"].find("system-out").text == "not listed: 6 samples of further prompts"


def test_records_of_measures_have_suites_too(tmp_path):
    records = [{"layer": layer, "k": 8, "fve": layer / 10} for layer in (1, 2)]
    _, suites = report(tmp_path, records, "--fail-under", "fve=0.1")
    assert list(suites) == ["gates", "1 8", "2 8", "all all"]


def test_the_same_records_give_the_same_bytes(tmp_path):
    def made():
        report(tmp_path, record("a", 1, 0))
        return (tmp_path / "r.xml").read_bytes()

    assert made() == made()


def test_no_file_is_left_half_written(tmp_path):
    (tmp_path / "v.jsonl").write_bytes(dump(record("a", 1)[0]))
    result = invoke("stats", tmp_path / "v.jsonl", "--junit", "/proc/none/r.xml")
    assert result.exit_code == 73
