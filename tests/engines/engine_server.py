"""A server that follows the documented protocol of SGLang or vLLM, with a small model behind it.

It is no running SGLang or vLLM: it has their paths, the fields of their requests and answers, and
their rules for what is refused, as their documentation and sources have them. Completions come from
the model, token by token, so that ids, lengths, ends, seeds and log-probabilities are real.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from dlmctl.models.loading import load_policy

GENERATE = {"sglang": "/generate", "vllm": "/v1/completions"}

SGLANG_FIELDS = {"input_ids", "sampling_params", "return_logprob", "top_logprobs_num", "stream"}
SGLANG_SAMPLING = {
    "n",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "sampling_seed",
    "stop_token_ids",
    "no_stop_trim",
    "skip_special_tokens",
}
VLLM_FIELDS = (SGLANG_SAMPLING - {"max_new_tokens", "sampling_seed", "no_stop_trim"}) | {
    "model",
    "prompt",
    "max_tokens",
    "seed",
    "logprobs",
    "return_token_ids",
    "stream",
}

Fault = Callable[[int], Any]
"""What goes wrong with the generation of this number, from 1: None is nothing, a number is an HTTP
status, "drop" cuts the connection, bytes are sent in the place of the answer, and a function
changes the answer."""


class RefusedError(Exception):
    """HTTP 400 with a message."""


class EngineServer:
    """A server on a free port of this machine; leave the `with` block and it is gone."""

    def __init__(
        self,
        kind: str,
        directory: str | Path,
        fault: Fault = lambda number: None,
        processed: bool = False,
        development: bool = True,
        lora: bool = False,
        name: str | None = None,
    ) -> None:
        """Args:
        processed: whether log-probabilities are those after temperature, top-k and top-p.
        development: whether vLLM was started so that it takes weights.
        lora: whether vLLM was started so that it takes adapters.
        name: of the model, if it is not its path.
        """
        self.kind, self.fault, self.processed = kind, fault, processed
        self.development, self.lora = development, lora
        self.directory, self.name = str(directory), name or str(directory)
        self.restart()
        self.session: list[str] = []
        """What has been called since the update of weights began, in vLLM."""
        self.paused = False
        self.key: str | None = None
        """The bearer token that it wants."""
        self.starting = 0
        """How many more times it says that it is not up yet."""
        self.pushed: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"owner": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> EngineServer:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """From now on nothing listens at the port."""
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        """Have the weights that it was started with again, as a new process."""
        self.policy, self.version = load_policy(self.directory, "cpu", "float32"), "default"
        self.adapters: dict[str, Any] = {}
        self.path, self.initialized = self.name, 0
        """How often vLLM was told to expect weights; once for a process."""

    # The model

    def complete(
        self, prompt: list[int], length: int, how: dict[str, Any], seed: int, policy: Any = None
    ) -> tuple[list[int], list[float], list[tuple[float, int]], str]:
        """Ids, their log-probabilities, the best token at each place, and why it ended."""
        generator = torch.Generator().manual_seed(seed)
        temperature = how["temperature"]
        made: list[int] = []
        scores: list[float] = []
        best: list[tuple[float, int]] = []
        ends = {*how["stop_token_ids"], self.policy.eos_id}
        while len(made) < length:
            with torch.no_grad():
                logits = (
                    (policy or self.policy)
                    .model(torch.tensor([[*prompt, *made]]))
                    .logits[0, -1]
                    .double()
                )
            cut = _cut(logits / (temperature or 1.0), how["top_k"], how["top_p"])
            token = int(logits.argmax())
            if temperature:
                token = int(torch.multinomial(cut.softmax(0), 1, generator=generator))
            shown = (cut if self.processed else logits).log_softmax(0)
            made.append(token)
            scores.append(float(shown[token]))
            best.append((float(shown.max()), int(shown.argmax())))
            if token in ends:
                return made, scores, best, "stop"
        return made, scores, best, "length"

    def load(self, path: str, version: str | None) -> None:
        if not Path(path).is_absolute() or not Path(path).is_dir():
            raise RefusedError(f"{path} does not exist")
        self.policy = load_policy(path, "cpu", "float32")
        self.pushed.append(path)
        self.version = version or self.version

    # SGLang

    def get_sglang(self, path: str) -> Any:
        return {
            "/model_info": {
                "model_path": self.path,
                "is_generation": True,
                "weight_version": self.version,
            },
            "/server_info": {"version": "0.5.9", "dtype": "auto"},
        }.get(path)

    def post_sglang(self, path: str, query: str, body: dict[str, Any]) -> Any:
        if path == "/update_weights_from_disk":
            self.load(body["model_path"], body.get("weight_version"))
            self.path = body["model_path"]
            return {"success": True, "message": "Succeeded to update model weights."}
        if path != "/generate":
            return None
        how = body["sampling_params"]
        _only(body, SGLANG_FIELDS)
        _only(how, SGLANG_SAMPLING)
        _check(body["input_ids"], how)
        if not (how["top_k"] == -1 or how["top_k"] >= 1):
            raise RefusedError("top_k must be -1 (disable) or at least 1")
        tokens, scores, best, finish = self.complete(
            body["input_ids"], how["max_new_tokens"], how, how["sampling_seed"]
        )
        about: dict[str, Any] = {
            "id": "x",
            "finish_reason": {"type": finish, "matched": tokens[-1]}
            if finish == "stop"
            else {"type": finish, "length": len(tokens)},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(tokens),
            "weight_version": self.version,
        }
        if body.get("return_logprob"):
            about["output_token_logprobs"] = [
                [s, t, None] for s, t in zip(scores, tokens, strict=True)
            ]
            if body.get("top_logprobs_num"):
                about["output_top_logprobs"] = [[[s, t, None]] for s, t in best]
        return {"text": "", "output_ids": tokens, "meta_info": about}

    # vLLM

    def get_vllm(self, path: str) -> Any:
        card = {"id": "served", "object": "model", "root": self.path, "max_model_len": 4096}
        adapters = [
            {"id": name, "object": "model", "root": policy.name, "parent": "served"}
            for name, policy in self.adapters.items()
        ]
        found = {
            "/version": {"version": "0.28.0"},
            "/v1/models": {"object": "list", "data": [card, *adapters]},
        }
        if self.development:
            found["/weight_info"] = {"weight_version": self.version}
        return found.get(path)

    def post_vllm(self, path: str, query: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            return self._completion(body)
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.lora:
            return self._lora(path, body)
        if not self.development:
            return None
        if path == "/pause":
            assert query == "mode=wait"
            self.paused = True
            return {"status": "paused"}
        if path == "/resume":
            self.paused = False
            return {"status": "resumed"}
        if path == "/init_weight_transfer_engine":
            assert body == {"init_info": {}}
            self.initialized += 1
            return {"message": "Weight transfer initialized"}
        steps = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
        if path not in steps:
            return None
        if not self.paused or not self.initialized or path != steps[len(self.session)]:
            raise RefusedError("no weights can be taken now")
        self.session.append(path)
        if path == "/update_weights":
            self.load(body["update_info"]["path"], None)
        if path == "/finish_weight_update":
            self.session, self.version = [], body["weight_version"]
        return {"message": "ok"}

    def _lora(self, path: str, body: dict[str, Any]) -> bytes:
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            del self.adapters[name]
            return f"Success: LoRA adapter '{name}' removed successfully".encode()
        if name in self.adapters or not Path(body["lora_path"]).is_absolute():
            raise RefusedError(f"The lora adapter '{name}' cannot be loaded.")
        self.adapters[name] = load_policy(body["lora_path"], "cpu", "float32")
        self.pushed.append(body["lora_path"])
        return f"Success: LoRA adapter '{name}' added successfully".encode()

    def _completion(self, body: dict[str, Any]) -> Any:
        assert not self.paused
        _only(body, VLLM_FIELDS)
        _check(body["prompt"], body)
        policies = {"served": self.policy, **self.adapters}
        if body["model"] not in policies:
            raise RefusedError(f"The model `{body['model']}` does not exist.")
        tokens, scores, best, finish = self.complete(
            body["prompt"], body["max_tokens"], body, body["seed"], policies[body["model"]]
        )
        names = [{f"token {t}": s} for s, t in best]
        return {
            "id": "cmpl-x",
            "object": "text_completion",
            "model": "served",
            "choices": [
                {
                    "index": 0,
                    "text": "",
                    "finish_reason": finish,
                    "stop_reason": None,
                    "token_ids": tokens if body.get("return_token_ids") else None,
                    "logprobs": {
                        "tokens": [f"token {t}" for t in tokens],
                        "token_logprobs": scores,
                        "top_logprobs": [
                            {**name, f"token {t}": s}
                            for name, t, s in zip(names, tokens, scores, strict=True)
                        ],
                    },
                }
            ],
        }


def _cut(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits with -inf where a token may not be sampled: first --top-k, then --top-p."""
    if top_k > 0:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, len(logits)))[0][-1], -torch.inf
        )
    ordered, places = logits.sort(descending=True)
    before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
    return logits.masked_fill((before >= top_p)[places.argsort()], -torch.inf)


def _only(body: dict[str, Any], known: set[str]) -> None:
    if unknown := body.keys() - known:
        raise RefusedError(f"unknown fields {sorted(unknown)}")


def _check(prompt: Any, how: dict[str, Any]) -> None:
    if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
        raise RefusedError("the prompt is not a list of ids")
    if not (0 <= how["temperature"] <= 2 and 0 < how["top_p"] <= 1 and how["n"] == 1):
        raise RefusedError("temperature, top_p or n is out of range")


class _Handler(BaseHTTPRequestHandler):
    owner: EngineServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        if self.owner.starting:
            self.owner.starting -= 1
            self._bytes(503, b"")
            return
        if self.owner.key and self.headers["Authorization"] != f"Bearer {self.owner.key}":
            self._bytes(401, b'{"error": "Unauthorized"}')
            return
        self._send(getattr(self.owner, f"get_{self.owner.kind}")(self.path))

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path, _, query = self.path.partition("?")
        if path != GENERATE[owner.kind]:
            with owner.lock:
                self._answered(path, query, body)
            return
        with owner.lock:
            owner.bodies.append(body)
            fault = owner.fault(len(owner.bodies))
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        try:
            self._answered(path, query, body, fault)
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _answered(self, path: str, query: str, body: Any, fault: Any = None) -> None:
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._bytes(fault, b"<html><body>Internal Server Error</body></html>", "text/html")
            return
        if isinstance(fault, bytes):
            self._bytes(200, fault, "application/json")
            return
        try:
            answer = getattr(self.owner, f"post_{self.owner.kind}")(path, query, body)
        except RefusedError as error:
            self._bytes(400, json.dumps({"error": {"message": str(error)}}).encode())
            return
        if callable(fault):
            answer = fault(answer) or answer
        if answer == "drop":
            self.close_connection = True
            return
        self._send(answer)

    def _send(self, answer: Any) -> None:
        if isinstance(answer, bytes):
            self._bytes(200, answer, "text/plain")
        elif answer is None:
            self._bytes(404, b'{"detail": "Not Found"}')
        else:
            self._bytes(200, json.dumps(answer).encode())

    def _bytes(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
