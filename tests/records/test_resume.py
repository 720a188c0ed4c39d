"""A file that a killed command left is finished as if nobody had killed it."""

import io
import json
import os
import random
from itertools import pairwise

import pytest
from conftest import invoke, read_jsonl, wait_for
from preload import parent
from preloaded import Command

from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.groups import BatchEnds, group_batches
from dlmctl.records.jsonl import Record, dump
from dlmctl.records.resume import Resume, Rule, Written, contains, find_rest
from dlmctl.settings.small import SmallModel


def prompts(count, bad=()):
    made = []
    for n in range(count):
        record = Record(id=f"p{n // 2}", text=n % 3, bad=n in bad)
        record.where = f"in:{n + 1}"
        made.append(record)
    return made


def lines_of(records, samples=None, on_error="skip"):
    """What a stage makes of records."""
    made = []
    for record in records:
        if record["bad"]:
            if on_error == "keep":
                made.append({**record, "error": {"where": record.where}})
            continue
        for n in range(samples or 1):
            number = {} if samples is None else {"sample": n}
            made.append({**record, **number, "made": record["text"] + n})
    return b"".join(map(dump, made))


def rest_of(whole, cut, records, rule):
    """Bytes that stay of what was written up to `cut`, and the records to go on with."""
    stream = io.BytesIO(whole[:cut])
    rest = find_rest(iter(records), stream, rule, "out.partial")
    assert whole[: rest.size].count(b"\n") == rest.lines
    return rest.size, list(rest.records)


@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_cut_at_any_byte_the_rest_completes_the_file(samples, on_error):
    records = prompts(7, bad=(0, 3, 6))
    whole = lines_of(records, samples, on_error)
    rule = Rule(frozenset({"sample", "made"}), samples, skips=on_error == "skip")
    for cut in range(len(whole) + 1):
        size, rest = rest_of(whole, cut, records, rule)
        assert whole[:size] + lines_of(rest, samples, on_error) == whole
        group = len(lines_of(records[1:2], samples)) + 60  # a group, and an error before it
        assert cut - size <= group


def test_the_walk_goes_back_to_where_a_batch_began():
    records = prompts(10, bad=(4,))
    whole = lines_of(records)
    begun = []

    def begins(record, made):
        begun.append((record.where, made))
        return made.lines % 4 == 0

    rule = Rule(frozenset({"made"}), skips=True, begins=begins)
    seven = len(b"".join(whole.splitlines(keepends=True)[:7]))
    size, rest = rest_of(whole, seven, records, rule)
    assert whole[:size].count(b"\n") == 4
    # The bad one left no line: whether it belongs to this batch or the last makes no difference.
    assert [record.where for record in rest][-5:] == [f"in:{n}" for n in range(6, 11)]
    assert begun[:2] == [("in:1", Written(0, 0)), ("in:2", Written(1, 0))]


def test_a_file_of_another_input_is_refused_with_the_line():
    records = prompts(4)
    whole = lines_of(records)
    rule = Rule(frozenset({"made"}))
    with pytest.raises(DataError, match=r"out.partial:1: it was not made of in:2.*--resume"):
        rest_of(whole, len(whole), records[1:], rule)
    with pytest.raises(DataError, match=r"out.partial:3: the input has no record for it"):
        rest_of(whole, len(whole), records[:2], rule)
    with pytest.raises(DataError, match=r"out\.partial:2"):
        rest_of(whole, len(whole), [records[0], records[2]], Rule(frozenset({"made"}), skips=True))
    changed = [Record(record, text=5) for record in records]
    with pytest.raises(DataError, match=r"out\.partial:1"):
        rest_of(whole, len(whole), changed, rule)
    with pytest.raises(DataError, match=r"out.partial:1: not JSON"):
        rest_of(b"{}}\n" + whole, len(whole), records, rule)


def test_a_group_of_another_size_is_refused():
    records = prompts(3)
    whole = lines_of(records, 3)
    for samples in (2, 4):
        with pytest.raises(DataError, match=f"out.partial:{min(samples, 3) + 1}"):
            rest_of(whole, len(whole), records, Rule(frozenset({"sample", "made"}), samples))


def test_lines_of_another_model_are_refused():
    records = prompts(2)
    whole = b"".join(dump({**r, "rollout": {"seed": 1, "revision": "a"}}) for r in records)
    rule = Rule(frozenset({"rollout"}), made_by={"rollout": {"revision": "a"}})
    assert rest_of(whole, len(whole), records, rule)[1] == []
    other = Rule(frozenset({"rollout"}), made_by={"rollout": {"revision": "b"}})
    with pytest.raises(DataError, match=r"out\.partial:1: it was made by another model"):
        rest_of(whole, len(whole), records, other)


def test_containment():
    assert contains({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1}})
    assert not contains({"a": {"b": 1}}, {"a": {"b": 2}})
    assert not contains({"a": 1}, {"a": {"b": 1}})
    assert not contains({}, {"a": None})


def test_batches_of_groups_begin_where_they_are_said_to():
    dice = random.Random(0)
    for trial in range(200):
        records = []
        for number in range(dice.randrange(1, 6)):
            size = 2 * dice.randrange(1, 4)
            place = {"round": number, "round_size": size} if trial % 2 else {}
            for n in range(size):
                bad = {"error": "x"} if trial % 4 > 1 and dice.random() < 0.2 else {}
                records.append(Record(id=n // 2, at=len(records), rollout=place, **bad))
        size = dice.randrange(1, 5)
        ends = BatchEnds(size)
        begun = [r["at"] for r in records if ends.begins(r)]
        batches = [[r["at"] for r in batch] for batch in group_batches(records, size)]
        assert batches == [[*range(*edge)] for edge in pairwise([*begun, len(records)])]


def test_what_cannot_be_gone_on_with(tmp_path, capsys):
    with pytest.raises(UsageError, match="-o FILE"):
        Resume("-", True)
    output = tmp_path / "out"
    assert not Resume(str(output), True).done
    output.write_text("")
    assert not Resume(str(output), False).done
    assert capsys.readouterr().err == ""
    assert Resume(str(output), True).done
    assert "nothing to do" in capsys.readouterr().err
    # A later command was killed: its file is gone on with.
    (tmp_path / "out.partial").write_text("")
    assert not Resume(str(output), True).done


def cuts(whole, count=6):
    """Places to cut a file at: both ends, line ends, and within lines."""
    dice = random.Random(1)
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    within = [dice.randrange(len(whole)) for _ in range(count // 2)]
    return [0, *within, *dice.sample(ends[:-1], count - len(within)), len(whole)]


def check(name, *line, output, count=6):
    """A command gives the same file wherever its first attempt was cut."""
    done = invoke(name, *line, "-o", output)
    assert done.exit_code == 0, done.output
    whole = output.read_bytes()
    partial = output.with_name(f"{output.name}.partial")
    kept = []
    for cut in cuts(whole, count):
        output.unlink()
        partial.write_bytes(whole[:cut])
        done = invoke(name, *line, "-o", output, "--resume")
        assert done.exit_code == 0, done.output
        assert output.read_bytes() == whole, cut
        assert not partial.exists()
        kept.append(int(done.stderr.split(" records of ")[0].split()[-1]))
    assert max(kept) > 0
    done = invoke(name, *line, "-o", output, "--resume")
    assert (done.exit_code, "nothing to do" in done.stderr) == (0, True)
    assert output.read_bytes() == whole
    return kept


@pytest.fixture
def problems(tmp_path):
    done = invoke("prompts", "countdown", "-n", "11", "-o", tmp_path / "prompts.jsonl")
    assert done.exit_code == 0
    lines = (tmp_path / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    bad = b'{"id":"no prompt"}\n'
    (tmp_path / "prompts.jsonl").write_bytes(b"".join([*lines[:3], bad, *lines[3:], bad]))
    return tmp_path / "prompts.jsonl"


SAMPLER = ("--gen-length", "8", "--block-length", "4", "--steps", "4")


@pytest.mark.parametrize("family", ["llada", "ar"])
@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_rollout_goes_on(tmp_path, saved_models, problems, family, on_error):
    sampler = SAMPLER if family == "llada" else ("--gen-length", "8")
    line = (problems, "-m", saved_models(family), "-n", "2", "-b", "6", "--on-error", on_error)
    kept = check("rollout", *line, *sampler, output=tmp_path / "out.jsonl", count=4)
    if on_error == "skip":
        assert {k % 6 for k in kept} == {0}


def test_rollout_of_a_task_goes_on_from_the_middle_of_a_batch_where_rows_end_early(
    tmp_path, saved_models
):
    line = ("--task", "countdown", "--prompts", "5", "-m", saved_models("llada"), "-n", "2")
    output = tmp_path / "out.jsonl"
    kept = check("rollout", *line, *SAMPLER[:4], "-b", "32", "--threshold", "0.5", output=output)
    assert max(kept) == 10


def test_rollout_with_other_options_is_refused(tmp_path, saved_models, problems):
    line = ["rollout", str(problems), "-m", saved_models("llada"), *SAMPLER, "--on-error", "skip"]
    output = tmp_path / "out.jsonl"
    assert invoke(*line, "-n", "2", "-o", output).exit_code == 0
    os.replace(output, f"{output}.partial")
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    for other in (["--seed", "1"], ["--temperature", "0.1"], ["-n", "3"]):
        done = invoke(*line, "-n", "2", *other, "-o", output, "--resume")
        assert done.exit_code == 65, other
        assert f"{output}.partial:1: it was made by another model, or with other" in done.stderr
        assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    done = invoke("rollout", "--follow", tmp_path / "run", "--resume", "-o", output)
    assert done.exit_code == 2


def test_score_elbo_goes_on_and_again_under_another_label(tmp_path, saved_models, problems):
    samples, once = tmp_path / "samples.jsonl", tmp_path / "once.jsonl"
    made = invoke("rollout", problems, "-m", saved_models("llada"), "-n", "2", *SAMPLER,
                  "--on-error", "skip", "-o", samples)  # fmt: skip
    assert made.exit_code == 0
    rows = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join([*rows[:4], b"no JSON\n", *rows[4:]]))
    for on_error in ("skip", "keep"):
        line = ("-m", saved_models("llada"), "-b", "5", "--on-error", on_error)
        kept = check("score-elbo", samples, *line, output=once, count=3)
        assert {k % 5 for k in kept[:-1]} == {0}
        once.rename(tmp_path / "first.jsonl")
    check("score-elbo", tmp_path / "first.jsonl", "-m", f"other={saved_models('dream')}", "-b", "4",
          output=tmp_path / "twice.jsonl", count=1)  # fmt: skip
    assert set(read_jsonl(tmp_path / "twice.jsonl")[0]["elbo"]) == {"policy", "other"}


def test_verify_goes_on_and_knows_what_judged_before(tmp_path):
    rows = []
    for n in range(6):
        kind = {"numbers": [n, 2], "target": n + 2} if n < 3 else {"answer": "x"}
        task = "countdown" if n < 3 else "exact"
        rows.append({"id": n, "task": task, **kind, "completion": f"{n}+2", "reward": 7})
    rows.insert(2, {"id": "bad", "task": "no such thing"})
    truth = {"task": "countdown", "question": "q", "generation": "<answer>1+2</answer>"}
    rows += [{**truth, "ground_truth": [[1, 2], 3]}, {**truth, "ground_truth": 3}]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(map(dump, rows)))
    for on_error in ("skip", "keep"):
        kept = check("verify", source, "--on-error", on_error, "--weight", "countdown=2",
                     output=tmp_path / f"{on_error}.jsonl", count=8)  # fmt: skip
        assert len(set(kept)) > 3


@pytest.mark.parametrize("scale", ["none", "batch"])
def test_advantage_goes_on(tmp_path, scale):
    rows = [
        {"id": n // 3, "sample": n % 3, "reward": (n * 7 % 5) / 3, "rollout": {"samples": 3}}
        for n in range(18)
    ]
    rows.insert(5, {"id": "x", "error": {"where": "", "message": "upstream"}})
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(map(dump, rows)))
    check("advantage", source, "--scale", scale, output=tmp_path / "out.jsonl", count=8)


def test_advantages_of_tokens_go_on_at_a_batch(tmp_path):
    text = "<description>1 2</description> <think>1+2</think> \\boxed{3}"
    tokenizer = character_tokenizer("".join(sorted(set(text))))
    policy, rows = make_policy(SmallModel("llada", 16, 2, 2), tokenizer, seed=1), []
    save_policy(policy, tmp_path / "model")
    for n in range(12):
        # One without ids, which cannot be weighted.
        tokens = {} if n == 5 else {"tokens": {"completion": policy.encode_text(text)}}
        rows.append({"id": f"g{n // 2}", "sample": n % 2, "prompt": "1+2", "completion": text,
                     "reward": n * 5 % 3, "rollout": {"samples": 2}, **tokens})  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(map(dump, rows)))
    for on_error in ("skip", "keep"):
        output = tmp_path / f"{on_error}.jsonl"
        kept = check("advantage", source, "--algo", "srpo", "-b", "4", "-m", tmp_path / "model",
                     "--on-error", on_error, output=output, count=4)  # fmt: skip
        assert set(kept) - {0}
        made = read_jsonl(output)
        assert any(row.get("credit", {}).get("scored") for row in made)
        assert [row["id"] for row in made] == sorted(row["id"] for row in made)


def test_a_killed_rollout_goes_on_to_the_same_bytes(tmp_path, saved_models, problems):
    line = ["rollout", "-q", "-m", saved_models("llada"), "-n", "4", "-b", "4",
            *SAMPLER, "--on-error", "skip", "-o", "out.jsonl"]  # fmt: skip

    def start(source, *more):
        null = os.open(os.devnull, os.O_RDWR)
        errors = os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        command = Command(parent(), [*line, *more], [source, null, errors], tmp_path)
        for number in (source, null, errors):
            os.close(number)
        return command

    def whole_input():
        return os.open(problems, os.O_RDONLY)

    assert start(whole_input()).wait() == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    partial = tmp_path / "out.jsonl.partial"
    # Its input does not end, so that it is not done before it is killed.
    reading, writing = os.pipe()
    victim = start(reading)
    os.write(writing, problems.read_bytes())
    wait_for(lambda: partial.exists() and partial.stat().st_size > 2000)
    victim.send_signal(9)
    victim.wait()
    os.close(writing)
    assert start(whole_input(), "--resume").wait() == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert "resuming after" in (tmp_path / "err").read_text()
    assert json.loads(whole.splitlines()[0])["sample"] == 0


def test_a_failure_says_how_to_go_on(tmp_path):
    source = tmp_path / "in.jsonl"
    row = {"id": 1, "task": "countdown", "numbers": [1, 2], "target": 3, "completion": "1+2"}
    source.write_bytes(dump(row) + b"{\n")
    output = tmp_path / "out.jsonl"
    done = invoke("verify", source, "-o", output)
    assert done.exit_code == 65
    assert f"in {output}.partial; the same command with --resume continues it" in done.stderr
    source.write_bytes(dump(row) + dump({**row, "id": 2}))
    assert invoke("verify", source, "-o", output, "--resume").exit_code == 0
    assert [r["id"] for r in read_jsonl(output)] == [1, 2]
    done = invoke("verify", source, "--resume")
    assert (done.exit_code, "-o FILE" in done.stderr) == (2, True)
