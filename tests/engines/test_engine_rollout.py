"""`rollout --engine`: completions of servers that follow the protocols of SGLang and vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import nearly, read_jsonl
from engine_server import EngineServer
from engine_world import (
    KINDS,
    PROMPTS,
    SAMPLES,
    rolled,
    said_once,
    sampled,
    save_model,
    scored,
    write_prompts,
)

from dlmctl.engines import server as servers
from dlmctl.engines.spread import Spread
from dlmctl.models.loading import load_policy

pytest.importorskip("httpx2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("ar"), 1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_records_are_those_of_our_own_sampler(prompts, model, kind):
    own = sampled(prompts, model, "--temperature", 0, "--dtype", "float32", "--device", "cpu")
    with EngineServer(kind, model) as server:
        served = sampled(prompts, model, "--temperature", 0, "--engine", server.url)
    version = {"sglang": "sglang 0.5.9", "vllm": "vllm 0.28.0"}[kind]
    finishes = {record["rollout"]["finish"] for record in own}
    assert finishes == {"eos", "length"}  # the case is there
    for one, other in zip(own, served, strict=True):
        assert other["rollout"].pop("engine") == version
        assert one["rollout"].pop("dtype") == "float32"
        assert [*other] == [*one]
        assert [*other["rollout"]] == [*one["rollout"]]
        assert other == nearly(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [["--temperature", "1.5"], ["--top-k", "3", "--top-p", "0.9"]])
def test_log_probabilities_are_written_if_they_are_the_models(prompts, model, kind, options):
    with EngineServer(kind, model) as server:
        records = sampled(prompts, model, *options, "--engine", server.url)
    assert [r["rollout"]["log_probs"] for r in records] == nearly(scored(model, records), 1e-4)
    with EngineServer(kind, model, processed=True) as server:
        after = sampled(prompts, model, *options, "--engine", server.url)
    assert [r["tokens"] for r in after] == [r["tokens"] for r in records]
    assert not any("log_probs" in record["rollout"] for record in after)


@pytest.mark.parametrize("kind", KINDS)
def test_at_temperature_1_they_are_the_models_in_any_server(prompts, model, kind):
    with EngineServer(kind, model, processed=True) as server:
        records = sampled(prompts, model, "--temperature", 1, "--engine", server.url)
        count = len(server.bodies)
    assert [r["rollout"]["log_probs"] for r in records] == nearly(scored(model, records), 1e-4)
    assert count == len(PROMPTS) * SAMPLES  # nothing was asked to find it out


def slow(number: int) -> Callable[[Any], None]:
    return lambda answer: time.sleep(0.02 * (number * 7 % 5))


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_tokens_do_not_depend_on_who_answers_or_when(prompts, model, kind):
    options = ["--temperature", 1, "-b", 2, "--engine"]
    with EngineServer(kind, model) as one, EngineServer("sglang", model) as two:
        alone = sampled(prompts, model, *options, one.url)
        all_there = threading.Barrier(4)  # the two first requests of both
        one.fault = two.fault = lambda number: (
            (lambda answer: all_there.wait() and None) if number <= 2 else slow(number)
        )
        one.bodies.clear()
        both = sampled(prompts, model, *options, f"{one.url},{two.url}/v1/")
        assert len(one.bodies) + len(two.bodies) == len(PROMPTS) * SAMPLES
        assert [one.most_at_once, two.most_at_once] == [2, 2]
    assert [(r["id"], r["sample"], r["tokens"]) for r in both] == [
        (r["id"], r["sample"], r["tokens"]) for r in alone
    ]
    assert len({orjson.dumps(r["tokens"]) for r in alone}) > len(PROMPTS)  # seeds differ


def test_parts_are_those_of_the_whole(prompts, model):
    with EngineServer("vllm", model) as server:
        whole = sampled(prompts, model, "--engine", server.url)
        parts = [
            sampled(prompts, model, "--engine", server.url, "--shard", f"{n}/2") for n in (1, 2)
        ]
    assert parts[0] + parts[1] == whole


FAILURES = {
    "page": lambda number: 500 if number % 3 == 0 else None,
    "busy": lambda number: 429 if number % 4 == 1 else None,
    "cut": lambda number: "drop" if number % 3 == 1 else None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", FAILURES)
def test_lost_requests_are_sent_again(prompts, model, kind, failure):
    with EngineServer(kind, model) as server:
        calm = sampled(prompts, model, "--engine", server.url)
        server.fault = FAILURES[failure]
        server.bodies.clear()
        assert sampled(prompts, model, "-b", 2, "--engine", server.url) == calm
        assert len(server.bodies) > len(PROMPTS) * SAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_are_lost_together_are_one_failure(prompts, model, kind):
    with EngineServer(kind, model) as server:
        calm = sampled(prompts, model, "--temperature", 1, "--engine", server.url)
        together = len(PROMPTS) * SAMPLES
        all_there = threading.Barrier(together)
        server.bodies.clear()

        def cut(answer: Any) -> str:
            all_there.wait()
            server.starting = 1
            return "drop"

        server.fault = lambda number: cut if number <= together else None
        again = sampled(prompts, model, "--temperature", 1, "--engine", server.url)
    assert again == calm
    assert len(server.bodies) == 2 * together


@pytest.mark.parametrize("kind", KINDS)
def test_the_requests_of_a_server_that_dies_go_to_the_others(prompts, model, kind):
    with EngineServer(kind, model) as calm, EngineServer(kind, model) as dying:
        before = sampled(prompts, model, "--engine", calm.url)

        dead = threading.Event()

        def die(number: int) -> Any:
            if number == 2:
                threading.Thread(target=dying.die).start()
                dead.set()
            return "drop" if number >= 2 else None

        dying.fault = die
        calm.fault = lambda number: lambda answer: dead.wait() and None
        done = rolled(prompts, model, "-b", 2, "--engine", calm.url, "--engine", dying.url)
    assert done.exit_code == 0, done.stderr
    assert [orjson.loads(line) for line in done.stdout.splitlines()] == before
    assert len(dying.bodies) >= 2


def test_a_server_that_never_was_there_is_left_out_and_named(prompts, model, monkeypatch):
    named = threading.Event()
    give_up = Spread._give_up
    monkeypatch.setattr(Spread, "_give_up", lambda *given: give_up(*given) or named.set())
    with EngineServer("vllm", model) as gone:
        pass
    with EngineServer("sglang", model) as server:
        server.fault = lambda number: lambda answer: named.wait() and None
        done = rolled(prompts, model, "-b", 1, "--engine", f"{gone.url},{server.url}")
    assert done.exit_code == 0
    assert f"going on without a server: {gone.url} does not answer" in said_once(done)


def test_where_no_server_is_left_what_is_finished_is_written(prompts, model, tmp_path):
    output = tmp_path / "samples.jsonl"
    options = ["-b", 1, "-o", output, "--resume", "--engine"]
    with EngineServer("sglang", model) as server:
        whole = sampled(prompts, model, "--engine", server.url)
        server.fault = lambda number: 503 if number > 20 else None
        done = rolled(prompts, model, *options, server.url)
        assert done.exit_code == 75
        assert "no server is left" in said_once(done)
        partial = read_jsonl(tmp_path / "samples.jsonl.partial")
        assert partial == whole[: len(partial)]
        assert 0 < len(partial) < len(whole)
        server.fault = lambda number: None
        assert rolled(prompts, model, *options, server.url).exit_code == 0
    assert read_jsonl(output) == whole


def test_a_request_that_no_server_answers_ends_the_stage(prompts, model):
    with EngineServer("sglang", model) as server:
        poison = load_policy(model).encode({"prompt": PROMPTS[1]})

        def fails(number: int) -> Any:
            return 500 if server.bodies[-1]["input_ids"] == poison else None

        server.fault = fails
        done = rolled(prompts, model, "--engine", server.url, "-b", 1, "--temperature", 1)
    assert done.exit_code == 75
    assert len(done.stdout.splitlines()) == SAMPLES  # those of the first prompt
    assert "HTTP 500" in said_once(done)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_without_an_answer_is_lost(prompts, model, kind):
    with EngineServer(kind, model) as server:
        calm = sampled(prompts, model, "--engine", server.url)
        released = threading.Event()
        server.bodies.clear()
        server.fault = lambda number: (
            (lambda answer: released.wait() and None) if number == 1 else None
        )
        late = sampled(prompts, model, "--engine", server.url, "--engine-timeout", 1)
        released.set()
    assert late == calm
