"""Regular expressions: those of Python's re match alike, and hostile ones neither hang nor grow."""

import re

import pytest
from conftest import HANGS, invoke, read_jsonl

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import dump
from dlmctl.settings.verify import Matching
from dlmctl.verifiers.regexes import LONGEST_PATTERN, regex

pytest.importorskip("regex")


def judge(pattern, completion, limit=HANGS, **fields):
    return regex({"pattern": pattern, "completion": completion, **fields}, limit)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\d{3}-\d{4}", "call 555-1234 now"),
        (r"\d{3}-\d{4}", "555-1234"),
        (r"^Subject: .+\n\n", "Subject: hello\n\nDear all"),
        (r"(?i)yes|no", "YES"),
        (r"(?m)^- .*$", "a\n- b"),
        (r"(\w)\1", "abc"),
        (r"a\Z", "a\n"),
        (r"", "anything"),
        (r"é+", "caféé"),
        ("\0", "a\0b"),
    ],
)
def test_it_agrees_with_re(pattern, text):
    found, whole = re.search(pattern, text), re.fullmatch(pattern, text.strip())
    verdict = judge(pattern, text)
    assert verdict.reward == bool(found)
    assert verdict.detail["matched"] == (found.group() if found else None)
    assert judge(pattern, text, match="full").reward == bool(whole)


HOSTILE = {
    "backtracking": (r"(x+x+)+y", "x" * 5000),
    "recursion, which the package's own limit does not stop": (r"(a|aa)+(?R)?$", "a" * 5000 + "b"),
    "compilation": ("a{1000000000}", "a"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_long_is_0_and_the_next_record_is_judged(name):
    verdict = judge(*HOSTILE[name], limit=1.0)
    assert verdict.reward == 0
    assert re.search("took longer|took more memory|ended", verdict.detail["why"])
    assert judge("b", "abc").reward == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "(" * 5000}, "no regular expression"),
        ({"pattern": "a" * (LONGEST_PATTERN + 1)}, "at most"),
        ({"pattern": ["a"]}, "there is no pattern"),
        ({}, "there is no pattern"),
        ({"pattern": "a", "match": "start"}, "expected search or full"),
        ({"pattern": "a", "match": ["full"]}, "expected search or full"),
    ],
)
def test_what_is_no_pattern_is_said(fields, message):
    with pytest.raises(DataError, match=message):
        regex({"completion": "a", **fields}, HANGS)


def test_the_option_is_for_records_without_a_pattern(tmp_path):
    assert regex({"completion": "abc"}, HANGS, Matching("b", "full")).reward == 0
    rows = [{"completion": "12"}, {"completion": "12", "pattern": "x"}, {"completion": "1 2"}]
    (tmp_path / "in.jsonl").write_bytes(b"".join(map(dump, rows)))
    options = ["--verifier", "regex", "--pattern", r"\d+", "--match", "full"]
    done = invoke("verify", *options, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.exit_code == 0
    assert [row["reward"] for row in read_jsonl(tmp_path / "out.jsonl")] == [1, 0, 0]
