"""The verifier `judge` on a real HTTP server: scores, failures, the cache, what is asked."""

import re
import threading

import pytest
from conftest import invoke, read_jsonl
from judge_server import JudgeServer

from dlmctl.engines import judge as module
from dlmctl.engines.judge import KEY, Judge, request_text
from dlmctl.records.errors import DataError, MissingInputError, TryAgainError, UsageError
from dlmctl.records.jsonl import Record, dump
from dlmctl.settings.verify import Asking
from dlmctl.verifiers.registry import verify

pytest.importorskip("httpx2")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Pauses between tries that a test can wait for."""
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


def length_of_answer(question):
    """A judge that gives a point for each letter of the answer."""
    answer = question.partition("Answer of the assistant:\n")[2].partition("\n\nHow right")[0]
    return f"Scores differ. Score: 3? No.\nScore: {min(10, len(answer))}"


def records(*completions):
    return [Record({"prompt": f"p{n}", "completion": text}) for n, text in enumerate(completions)]


def rewards(server, rows, on_error="fail", **options):
    asking = Asking(judge_url=server.url, judge_model="m", **options)
    done = verify(rows, ["judge"], settings={"asking": asking}, on_error=on_error)
    return [row.get("reward") for row in done]


def test_scores_become_rewards_in_the_order_of_the_records():
    texts = ["x" * (n % 12) for n in range(40)]
    with JudgeServer(length_of_answer) as server:
        assert rewards(server, records(*texts)) == [min(10, len(t)) / 10 for t in texts]
        assert rewards(server, records("xxx"), judge_scale="1,5") == [0.5]
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0, 0)
    assert body["max_tokens"] == 1024
    assert "Reference answer" not in body["messages"][0]["content"]


def test_several_are_asked_at_once_and_no_more():
    with JudgeServer(length_of_answer) as server:
        server.hold = threading.Barrier(4)  # a reply leaves when four questions have come
        assert len(rewards(server, records(*"abcdefgh"), judge_at_a_time=4)) == 8
    assert server.most_at_once == 4


def test_equal_questions_are_asked_once():
    rows = [Record({"prompt": "p", "completion": "same"}) for _ in range(20)]
    with JudgeServer(length_of_answer) as server:
        assert rewards(server, rows) == [0.4] * 20
    assert server.requests == 1


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "drop"])
def test_a_passing_failure_is_asked_again(fault):
    with JudgeServer(length_of_answer, lambda n: fault if n % 3 else None) as server:
        assert rewards(server, records(*"abcde")) == [0.1] * 5
    assert len(server.bodies) == 5


def test_a_server_that_stays_away_ends_the_stage_with_what_was_judged(tmp_path):
    source, target, cache = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "cache"))
    source.write_bytes(b"".join(map(dump, records(*(("x" * n) for n in range(20))))))
    options = ["--verifier", "judge", "--judge-model", "m", "--judge-at-a-time", "1"]
    options += ["--judge-patience", "0.05", "--judge-cache", cache, "--resume", "-o", target]
    with JudgeServer(length_of_answer, lambda n: 503 if n > 6 else None) as server:
        stopped = invoke("verify", *options, "--judge-url", server.url, source)
        assert stopped.exit_code == 75
        assert "stays away" in stopped.stderr
        partial = read_jsonl(tmp_path / "out.jsonl.partial")
        assert [row["reward"] for row in partial] == [n / 10 for n in range(6)]
        server.fault = lambda number: None
        assert invoke("verify", *options, "--judge-url", server.url, source).exit_code == 0
        asked = [body["messages"][0]["content"] for body in server.bodies]
        assert len(asked) == len({*asked}) == 20
    whole = target.read_bytes()
    # From the cache alone, without the server.
    target.unlink()
    assert invoke("verify", *options, "--judge-url", server.url, source).exit_code == 0
    assert target.read_bytes() == whole


def test_the_key_is_sent_and_never_shown(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY, "sk-secret")
    (tmp_path / "in.jsonl").write_bytes(dump({"completion": "x"}))
    options = ["--verifier", "judge", "--judge-model", "m", "--judge-cache", tmp_path / "c"]
    with JudgeServer(length_of_answer) as server:
        done = invoke("verify", *options, "--judge-url", server.url, tmp_path / "in.jsonl")
        server.fault = lambda number: 401
        options = options[:-2]
        refused = invoke("verify", *options, "--judge-url", server.url, tmp_path / "in.jsonl")
    assert server.keys == ["Bearer sk-secret"] * 2
    assert (done.exit_code, refused.exit_code) == (0, 2)
    assert KEY in refused.stderr
    said = done.output + done.stderr + refused.output + refused.stderr
    assert "secret" not in said
    assert b"secret" not in (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    "reply", ["no number", "Score: eleven", "Score: 11", "Score: -1", "", None, {"a": 1}, "\0"]
)
def test_a_reply_without_a_score_is_an_error_of_its_record(reply):
    def says(question):
        return reply if "bad" in question else "Score: 5"

    with JudgeServer(says) as server:
        assert rewards(server, records("a", "bad", "c"), "skip") == [0.5, 0.5]
        with pytest.raises(DataError, match=r"judge|text of a message"):
            rewards(server, records("bad"))


def test_scores_are_read_from_common_forms():
    replies = {
        "**Score:** 7": 0.7,
        "<think>Score: 1</think> Score = 8.5": 0.85,
        "score: 3/10": 0.3,
        '{"score": 4}': 0.4,
        "Score: 2 ... Score: 6": 0.6,
        "x" * 200_000 + "Score: 9": 0.9,
    }
    for reply, reward in replies.items():
        with JudgeServer(lambda question, reply=reply: reply) as server:
            assert rewards(server, records("a")) == [reward], reply
    with JudgeServer(lambda question: "verdict [[1]]") as server:
        options = {"judge_score": r"\[\[(\d)\]\]", "judge_scale": "0,1"}
        assert rewards(server, records("a"), **options) == [1.0]


def test_the_template_has_the_record_and_runs_in_a_sandbox(tmp_path):
    path = tmp_path / "question.jinja"
    path.write_text("{{ request }}|{{ completion }}|{{ gold.text }}|{{ low }}-{{ high }}")
    row = Record({"prompt": "p", "completion": "{{ 7 * 7 }}<|endoftext|>x", "gold": {"text": "g"}})
    with JudgeServer(lambda question: "Score: 5") as server:
        assert rewards(server, [row], judge_template=path) == [0.5]
        assert server.bodies[0]["messages"][0]["content"] == "p|{{ 7 * 7 }}|g|0-10"
        for source in ("{{ nothing }}", "{{ ''.__class__.__mro__ }}", "{{ gold.clear() }}"):
            path.write_text(source)
            with pytest.raises(DataError, match="cannot be filled in"):
                rewards(server, [row], judge_template=path)
        path.write_text("{{")
        with pytest.raises(UsageError, match="is no template"):
            rewards(server, [row], judge_template=path)
        with pytest.raises(MissingInputError):
            rewards(server, [row], judge_template=tmp_path / "none")


def test_a_round_of_a_training_loop_is_judged_before_the_next_one_comes():
    with JudgeServer(length_of_answer) as server:
        asking = Asking(judge_url=server.url, judge_model="m")
        given = []

        def source():
            for number in range(6):
                given.append(number)
                rollout = {"round": number // 3, "round_size": 3, "samples": 3}
                yield Record({"id": number // 3, "completion": "x" * number, "rollout": rollout})

        done = verify(source(), ["judge"], settings={"asking": asking})
        assert [next(done)["reward"] for _ in range(3)] == [0.0, 0.1, 0.2]
        assert given == [0, 1, 2]
        done.close()


def test_records_before_a_faulty_line_are_judged(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(dump({"completion": "xx"}) + b"no JSON\n")
    with JudgeServer(length_of_answer) as server:
        options = ["--verifier", "judge", "--judge-model", "m", "--judge-url", server.url]
        done = invoke("verify", *options, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.exit_code == 65
    assert read_jsonl(tmp_path / "out.jsonl.partial")[0]["reward"] == 0.2


def test_requests_are_read_from_prompts_and_messages():
    assert request_text({"prompt": "p"}) == "p"
    assert request_text({}) == request_text({"prompt": 5}) == ""
    assert request_text({"messages": [{"role": "user", "content": "q"}]}) == "q"
    parts = [{"type": "image"}, {"type": "text", "text": "see"}]
    two = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    assert request_text({"messages": two}) == "system: s\n\nuser: see"
    for wrong in (["text"], [{"role": "user"}], [{"content": 5}]):
        with pytest.raises(DataError, match="without text"):
            request_text({"messages": wrong})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_scale": "5"}, "judge-scale"),
        ({"judge_scale": "5,5"}, "LOW < HIGH"),
        ({"judge_scale": "0,inf"}, "LOW < HIGH"),
        ({"judge_score": "("}, "no regular expression"),
        ({"judge_score": "a"}, "no group"),
        ({"judge_url": "nothing", "judge_model": "m"}, "--judge-url nothing is not a URL"),
        ({"judge_url": "http://localhost:1"}, "needs --judge-url"),
        ({}, "needs --judge-url"),
    ],
)
def test_what_cannot_be_asked_is_said_at_the_start(options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Judge(Asking(**options))


def test_a_cache_that_is_another_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("not SQLite" * 100)
    options = {"judge_url": "http://localhost:1", "judge_model": "m"}
    with pytest.raises(DataError, match="not a file of replies"):
        Judge(Asking(**options, judge_cache=tmp_path / "cache"))


def test_a_server_that_never_was_there():
    asking = Asking(judge_url="http://127.0.0.1:9", judge_model="m", judge_patience=0.0)
    with pytest.raises(TryAgainError, match="stays away"):
        Judge(asking)({"completion": "x"})
