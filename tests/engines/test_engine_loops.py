"""`rollout --follow --engine`: servers load the weights of each round. And Ctrl-C."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import nearly, read_jsonl, shell, wait_for
from engine_server import EngineServer, RefusedError
from engine_world import (
    KINDS,
    PROMPTS,
    rolled,
    said_once,
    sampled,
    save_model,
    scored,
    write_prompts,
)
from preload import parent
from preloaded import Command

from dlmctl.engines import server as servers
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


def loop(tmp_path: Path, model: str, url: str, rounds: int, options: str = "") -> Any:
    return shell(
        f"dlmctl rollout --follow run -m {model} --rounds {rounds} --raw --prompts 2 -n 4 "
        f"--gen-length 6 --temperature 1 --engine {url} {options} prompts.jsonl"
        " | tee -a samples.jsonl"
        " | jq -c --unbuffered '. + {reward: (.sample % 2)}'"
        " | dlmctl update --algo grpo -o run --lr 0.05 --device cpu --dtype float32 --keep 9",
        tmp_path,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_servers_load_the_weights_of_each_round(tmp_path, prompts, model, kind):
    with EngineServer(kind, model) as one, EngineServer(kind, model) as two:
        done = loop(tmp_path, model, f"{one.url},{two.url} -b 1", 3)
        assert done.returncode == 0, done.stderr
        assert len(one.pushed) == 2  # for the first round it was started with the weights
        assert two.pushed == one.pushed
        assert one.initialized == (kind == "vllm")
        # A second command goes on from the newest checkpoint.
        done = loop(tmp_path, model, one.url, 4)
        assert done.returncode == 0, done.stderr
    assert len({*one.pushed}) == 3
    records = read_jsonl(tmp_path / "samples.jsonl")
    assert [r["rollout"]["round"] for r in records] == [n for n in range(4) for _ in range(8)]
    for number, path in enumerate([model, *one.pushed]):
        own = records[number * 8 : number * 8 + 8]
        revision = load_policy(path, "cpu", "float32").revision
        assert {r["rollout"]["revision"] for r in own} == {revision}
        assert [r["rollout"]["log_probs"] for r in own] == nearly(scored(path, own), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_restarts_is_given_the_weights_again(prompts, model, kind, tmp_path):
    other = save_model(tmp_path / "other", 2)
    run = ["--follow", str(tmp_path / "run"), "--rounds", 1, "--prompts", len(PROMPTS), "-b", 1]
    with EngineServer(kind, model) as server:
        options = [*run, "--temperature", 1, "--engine", server.url]
        calm = sampled(prompts, other, *options)
        server.restart()
        count = len(server.bodies)

        def restart(number: int) -> Any:
            if number == count + 4:
                server.restart()
                return "drop"
            return None

        server.fault = restart
        again = sampled(prompts, other, *options)
        assert server.pushed == [other] * 3
    assert again == calm


def test_weights_that_change_under_way_are_noticed(prompts, model, tmp_path):
    other = save_model(tmp_path / "other", 2)
    run = ["--follow", str(tmp_path / "run"), "--rounds", 1, "--prompts", len(PROMPTS), "-b", 1]
    with EngineServer("sglang", model) as server:
        options = [*run, "--temperature", 1, "--engine", server.url]
        calm = sampled(prompts, other, *options)
        server.restart()
        count = len(server.bodies)
        server.fault = lambda number: server.restart() if number == count + 4 else None
        assert sampled(prompts, other, *options) == calm
        assert server.pushed == [other] * 3


def absent(path: str, version: str | None) -> None:
    raise RefusedError(f"not here: {path}")


def test_a_server_that_cannot_load_weights_ends_the_loop(prompts, model, tmp_path):
    run = ["--follow", str(tmp_path / "run"), "--rounds", 1, "--prompts", 2]
    other = save_model(tmp_path / "other", 2)
    with EngineServer("vllm", model, development=False) as server:
        done = rolled(prompts, model, *run, "--engine", server.url)
    assert done.exit_code == 2
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL" in said_once(done)
    with EngineServer("sglang", model) as server:
        server.post_sglang = lambda *_: {"success": False, "message": "no such file"}
        done = rolled(prompts, other, *run, "--engine", server.url)
    assert done.exit_code == 65
    assert "did not load weights (no such file); it must see the files of" in said_once(done)
    for kind in KINDS:
        with EngineServer(kind, model) as server:
            server.load = absent
            done = rolled(prompts, other, *run, "--engine", server.url)
        assert done.exit_code == 65
        assert f"with HTTP 400 (not here: {other})" in said_once(done)
        assert not server.paused


def adapting_loop(tmp_path: Path, model: str, url: str, rounds: int) -> Any:
    return shell(
        f"dlmctl rollout --follow run -m {model} --rounds {rounds} --raw --prompts 2 -n 4 "
        f"--gen-length 6 --temperature 1 --engine {url} prompts.jsonl"
        " | tee -a samples.jsonl"
        " | jq -c --unbuffered '. + {reward: (.sample % 2)}'"
        " | dlmctl update --algo grpo -o run --lr 0.05 --lora-rank 2 --device cpu --keep 9",
        tmp_path,
    )


def test_vllm_loads_the_adapter_of_each_round(prompts, model, tmp_path):
    pytest.importorskip("peft")
    with EngineServer("vllm", model, lora=True) as server:
        for rounds in (3, 4):  # the second command goes on from an adapter
            done = adapting_loop(tmp_path, model, server.url, rounds)
            assert done.returncode == 0, done.stderr
        assert len(server.pushed) == 3
        # A command unloads what it loaded itself.
        left = [load_policy(path, "cpu", "float32").revision for path in server.pushed[1:]]
        assert [*server.adapters] == left
        samples = sampled(prompts, server.pushed[-1], "--temperature", 1, "--engine", server.url)
    records = read_jsonl(tmp_path / "samples.jsonl")
    assert [r["rollout"]["round"] for r in records] == [n for n in range(4) for _ in range(8)]
    for number, path in enumerate([model, *server.pushed]):
        own = records[number * 8 : number * 8 + 8]
        revision = load_policy(path, "cpu", "float32").revision
        assert {r["rollout"]["revision"] for r in own} == {revision}
        assert [r["rollout"]["log_probs"] for r in own] == nearly(scored(path, own), 1e-4)
    assert [r["rollout"]["log_probs"] for r in samples] == nearly(
        scored(server.pushed[-1], samples), 1e-4
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sglang", "is a LoRA adapter, which --engine gives only to vLLM"),
        ("vllm", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL"),
    ],
)
def test_a_server_that_takes_no_adapters_ends_the_loop(prompts, model, tmp_path, kind, said):
    pytest.importorskip("peft")
    with EngineServer(kind, model) as server:
        done = adapting_loop(tmp_path, model, server.url, 2)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(read_jsonl(tmp_path / "samples.jsonl")) == 8


def test_ctrl_c_ends_a_stage_that_waits_for_a_server(prompts, model, tmp_path):
    released = threading.Event()
    with EngineServer("vllm", model) as server:
        server.fault = lambda number: (
            (lambda answer: released.wait() and None) if number > 3 else None
        )
        out = tmp_path / "out"
        with out.open("wb") as output, (tmp_path / "err").open("wb") as errors:
            options = f"-q -b 1 --raw -n 3 --gen-length 4 --temperature 1 -m {model}"
            line = f"rollout {options} --engine {server.url}"
            command = Command(
                parent(),
                [*line.split(), str(prompts)],
                [0, output.fileno(), errors.fileno()],
                tmp_path,
            )
            wait_for(lambda: out.read_bytes().count(b"\n") == 3)
            command.send_signal(signal.SIGINT)
            code = command.wait()
        released.set()
    assert code == -signal.SIGINT
    said = (tmp_path / "err").read_text()
    assert "interrupted: 3 records were written" in said
