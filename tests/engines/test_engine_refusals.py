"""`rollout --engine`: what is refused, and answers that cannot be used, each in one clear line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from engine_server import EngineServer
from engine_world import (
    KINDS,
    LONGEST,
    rolled,
    said_once,
    sampled,
    save_model,
    write_prompts,
)

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_with_another_model_is_refused(prompts, model, kind, tmp_path):
    other = save_model(tmp_path / "other", 2)
    with EngineServer(kind, other) as server:
        done = rolled(prompts, model, "--engine", server.url)
    assert done.exit_code == 2
    assert f"serves {other}, and -m is {model}" in said_once(done)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_with_the_weights_of_another_loop_is_refused(prompts, model, kind):
    with EngineServer(kind, model) as server:
        server.version = "0123456789abcdef"
        done = rolled(prompts, model, "--engine", server.url)
        assert done.exit_code == 2
        assert "has the weights 0123456789abcdef, which a training loop gave it" in said_once(done)
        server.version, server.path = load_policy(model).revision, "somewhere/else"
        sampled(prompts, model, "--engine", server.url)


def test_a_server_with_the_newest_checkpoint_of_a_run_may_have_an_older_one(
    prompts, model, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").symlink_to(model)
    for named in (tmp_path / "run", tmp_path / "run" / "latest"):
        with EngineServer("vllm", model, name=str(named)) as server:
            done = rolled(prompts, str(tmp_path / "run"), "--engine", server.url)
        assert done.exit_code == 2
        assert f"serves {named}, and -m is" in said_once(done)
    with EngineServer("vllm", model) as server:
        assert sampled(prompts, str(tmp_path / "run"), "--engine", server.url)


def test_another_program_is_refused(prompts, model):
    with EngineServer("sglang", model) as server:
        server.get_sglang = lambda path: None
        done = rolled(prompts, model, "--engine", server.url)
    assert done.exit_code == 2
    assert "is neither SGLang" in said_once(done)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "4"], "--steps is of dlmctl's own sampler"),
        (["--block-length", "4"], "--block-length is of dlmctl's own sampler"),
        (["--remasking", "random"], "--remasking is of dlmctl's own sampler"),
        (["--threshold", "0.9"], "--threshold is of dlmctl's own sampler"),
        (["--cache", "dual"], "--cache is of dlmctl's own sampler"),
        (["--cfg-scale", "1"], "--cfg-scale is of dlmctl's own sampler"),
        (["--compile"], "--compile is of dlmctl's own sampler"),
        (["--eos", "never"], "--eos is of dlmctl's own sampler"),
        (["--steer", "x:1=2"], "--steer and --engine do not go together"),
        (["--corrupt", "blank"], "--corrupt and --engine do not go together"),
        (["--quantize", "nf4"], "--quantize and --engine do not go together"),
        (["--engine", "nowhere"], "--engine nowhere is not a URL"),
        (["--engine", "http://a,,http://b"], "--engine is a URL"),
    ],
)
def test_what_only_our_own_sampler_has_is_refused(prompts, model, options, said):
    done = rolled(prompts, model, "--engine", "http://127.0.0.1:9", *options)
    assert done.exit_code == 2
    assert said in said_once(done)


def test_what_servers_do_not_sample_is_refused(prompts, saved_models, model, tmp_path):
    engine = ["--engine", "http://127.0.0.1:9"]
    done = rolled(prompts, saved_models("llada"), *engine)
    assert done.exit_code == 2
    assert "is a diffusion language model (llada)" in said_once(done)
    base = model
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_bytes(
            orjson.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
        )
        base = str(tmp_path / name)
    done = rolled(prompts, base, *engine)
    assert done.exit_code == 2
    assert "is an adapter over another one" in said_once(done)
    done = rolled(prompts, saved_models("qwen2.5-vl"), *engine)
    assert done.exit_code == 2
    assert "takes images" in said_once(done)


def changed(kind: str, field: str, value: Any) -> Callable[[Any], Any]:
    """An answer with another value in one of its fields."""

    def change(answer: Any) -> None:
        if kind == "sglang":
            scored = answer["meta_info"]["output_token_logprobs"]
            if field == "tokens":
                answer["output_ids"] = value
                answer["meta_info"]["output_token_logprobs"] = [[-1.0, t, None] for t in value]
            else:
                answer["meta_info"]["output_token_logprobs"] = [
                    [x, entry[1], None] for x, entry in zip(value * 99, scored, strict=False)
                ]
        else:
            choice = answer["choices"][0]
            scored = choice["logprobs"]["token_logprobs"]
            if field == "tokens":
                choice["token_ids"] = value
                choice["logprobs"]["token_logprobs"] = [-1.0] * len(value)
            else:
                choice["logprobs"]["token_logprobs"] = (value * 99)[: len(scored)]

    return change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tokens", [5, 99999], "has the id 99999"),
        ("tokens", [5, -1], "has the id -1"),
        ("tokens", [5] * (LONGEST + 1), f"has {LONGEST + 1} tokens, expected 1 to {LONGEST}"),
        ("tokens", [], "has 0 tokens"),
        ("tokens", [5, 6], "without an end of the sequence"),
        ("tokens", ["5", "6"], "has no list of token ids"),
        ("log_probs", [0.5], "has log-probabilities above 0"),
        ("log_probs", ["low"], "has log-probabilities that are no numbers"),
    ],
)
def test_an_answer_that_cannot_be_one_is_one_clear_line(prompts, model, kind, field, value, said):
    with EngineServer(kind, model) as server:
        server.fault = lambda number: changed(kind, field, value) if number == 2 else None
        done = rolled(prompts, model, "--engine", server.url, "-b", 1, "--temperature", 1)
    assert done.exit_code == 65
    assert said in said_once(done)
    assert f"{prompts}:1: the answer of {server.url}" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (b"<html>not JSON</html>", "something that is not JSON"),
        (b"[1, 2]", "has no meta_info|does not have one choice"),
        (b'{"choices": [], "meta_info": {}}', "log-probability for each token|one choice"),
        (400, "refuses .* with HTTP 400: .*|refuses .* with HTTP 400"),
        (302, "refuses .* with HTTP 302"),
        (401, "wants another key"),
    ],
)
def test_what_is_no_answer_is_one_clear_line(prompts, model, kind, fault, said):
    with EngineServer(kind, model) as server:
        server.fault = lambda number: fault if number == 2 else None
        done = rolled(prompts, model, "--engine", server.url, "-b", 1, "--temperature", 1)
    assert done.exit_code in (2, 65)
    assert re.search(said, said_once(done))
    assert len(done.stdout.splitlines()) == 1  # the first was finished


def test_a_refusal_has_the_words_of_the_server(prompts, model):
    with EngineServer("vllm", model) as server:
        server.get_vllm = _other_name(server.get_vllm)
        done = rolled(prompts, model, "--engine", server.url, "-b", 1)
    assert done.exit_code == 65
    assert "with HTTP 400 (The model `renamed` does not exist.)" in said_once(done)


def _other_name(plain: Callable[[str], Any]) -> Callable[[str], Any]:
    def get(path: str) -> Any:
        found = plain(path)
        if path == "/v1/models":
            found["data"][0]["id"] = "renamed"
        return found

    return get


def test_a_key_is_taken_from_the_environment(prompts, model, monkeypatch):
    monkeypatch.delenv("DLMCTL_ENGINE_KEY", raising=False)
    with EngineServer("sglang", model) as server:
        server.key = "secret"
        done = rolled(prompts, model, "--engine", server.url)
        assert done.exit_code == 2
        assert "wants another key (HTTP 401): it is in the environment variable" in said_once(done)
        monkeypatch.setenv("DLMCTL_ENGINE_KEY", "secret")
        sampled(prompts, model, "--engine", server.url)


def test_without_httpx2_the_command_that_installs_it_is_named(prompts, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    done = rolled(prompts, model, "--engine", "http://127.0.0.1:9")
    assert done.exit_code == 69
    assert "pip install 'dlmctl[engine]'" in said_once(done)
