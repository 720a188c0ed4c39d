"""vLLM by its OpenAI-compatible /v1/completions, with ids in and out.

docs.vllm.ai: "OpenAI-Compatible Server"; for new weights "Shared-disk weight updates", and "LoRA
Adapters", dynamically served. An adapter is named by its revision, so that a completion that the
server makes under this name is of it.
"""

from __future__ import annotations

from typing import Any

from dlmctl.engines.connection import Connection, Lost
from dlmctl.engines.protocol import Answer, Engine, Generation, Weights, same_model
from dlmctl.records.errors import DataError, UsageError

TAKES_ADAPTERS = (
    "a vLLM server takes adapters if it was started as  VLLM_SERVER_DEV_MODE=1 "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank RANK"
)


class VLLM(Engine):
    title = "vllm"
    takes_weights = (
        "a vLLM server takes new weights if it was started as  VLLM_SERVER_DEV_MODE=1 vllm serve "
        """MODEL --weight-transfer-config '{"backend": "disk"}'"""
    )

    def __init__(self, connection: Connection, version: str) -> None:
        super().__init__(connection, version)
        self._model = ""
        """The id under which requests name the model."""
        self._pushed: str | None = None
        """Version of the weights that it was given last."""
        self._adapter: str | None = None
        """The adapter that it was given last."""

    @classmethod
    def recognised(cls, connection: Connection) -> VLLM | None:
        said = connection.get("/version")
        if not isinstance(said, dict) or not isinstance(said.get("version"), str):
            return None
        return cls(connection, said["version"])

    def take(self, weights: Weights) -> None:
        if weights.base is not None:
            super().take(weights.base)
            self._take_adapter(weights)
            return
        super().take(weights)
        cards = self._cards()
        ours = [c for c in cards if same_model(weights, c["root"] or c["id"])]
        self._model = (ours or cards)[0]["id"]

    def served(self) -> list[Any]:
        return [card["root"] or card["id"] for card in self._cards()]

    def version_of_weights(self) -> str | None:
        said = self.connection.get("/weight_info")
        return str(said.get("weight_version") or "") if isinstance(said, dict) else None

    def push(self, weights: Weights) -> None:
        # A process is initialized once. One that no longer has what it was given is another.
        known = self._pushed is not None and self.version_of_weights() == self._pushed
        steps: list[tuple[str, dict[str, Any]]] = [
            ("/init_weight_transfer_engine", {"init_info": {}}),
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"path": str(weights.directory)}}),
            ("/finish_weight_update", {"weight_version": weights.revision}),
        ]
        # Pausing waits for requests under way, and clears the keys and values of the old weights.
        if self.connection.post("/pause", {}, absent=True, mode="wait") is None:
            raise UsageError(f"{self.connection.url} has no /pause: {self.takes_weights}")
        try:
            for path, body in steps[known:]:
                if self.connection.post(path, body, absent=True) is None:
                    raise UsageError(f"{self.connection.url} has no {path}: {self.takes_weights}")
        except (DataError, Lost) as error:
            raise type(error)(
                f"{error}; it must see the files of {weights.directory} under this path, and "
                f"{self.takes_weights}"
            ) from None
        finally:
            self.connection.post("/resume", {}, absent=True)
        self._pushed = weights.revision

    def _take_adapter(self, weights: Weights) -> None:
        """Load an adapter, unless it is there, and unload the one before it."""
        name, url = weights.revision, self.connection.url
        if name not in [card["id"] for card in self._cards()]:
            body = {"lora_name": name, "lora_path": str(weights.directory)}
            try:
                said = self.connection.post("/v1/load_lora_adapter", body, absent=True, plain=True)
            except DataError as error:
                needed = f"it must see {weights.directory} under this path, and {TAKES_ADAPTERS}"
                raise DataError(f"{error}; {needed}") from None
            if said is None:
                raise UsageError(f"{url} has no /v1/load_lora_adapter: {TAKES_ADAPTERS}")
            if name not in [card["id"] for card in self._cards()]:
                raise DataError(f"{url} was given the adapter {name}, and does not serve it")
        if self._adapter not in (None, name):
            old = {"lora_name": self._adapter}
            self.connection.post("/v1/unload_lora_adapter", old, absent=True, plain=True)
        self._adapter = self._model = name

    def generate(self, generation: Generation) -> Answer:
        choice = self._choice(generation)
        finish = choice.get("finish_reason")
        if finish in ("abort", "error"):
            raise Lost(f"{self.connection.url} gave the request up ({finish})")
        scored = choice.get("logprobs")
        log_probs = scored.get("token_logprobs") if isinstance(scored, dict) else None
        return self.checked(generation, choice.get("token_ids"), log_probs, finish)

    def best_log_prob(self, prompt: list[int], temperature: float) -> float:
        choice = self._choice(Generation(prompt, 0, 1, temperature, 1.0, 0, (), 0))
        try:
            return max(float(x) for x in choice["logprobs"]["top_logprobs"][0].values())
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise self.fault("does not have the log-probability of the best token") from None

    def _choice(self, generation: Generation) -> dict[str, Any]:
        said = self.connection.post("/v1/completions", _body(generation, self._model))
        choices = said.get("choices") if isinstance(said, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self.fault("does not have one choice")
        return choices[0]

    def _cards(self) -> list[dict[str, Any]]:
        """What it serves: objects with `id` and `root`, which is a path, a hub name or None."""
        said = self.connection.get("/v1/models")
        cards = said.get("data") if isinstance(said, dict) else None
        if not isinstance(cards, list) or not cards or not all(map(_is_card, cards)):
            raise self.fault("does not say what model it serves")
        return [{"root": None, **card} for card in cards]


def _is_card(card: Any) -> bool:
    return isinstance(card, dict) and isinstance(card.get("id"), str)


def _body(generation: Generation, model: str) -> dict[str, Any]:
    """A request, with what the server or the model might otherwise have defaults for."""
    greedy = generation.greedy
    return {
        "model": model,
        "prompt": generation.prompt,
        "n": 1,
        "max_tokens": generation.length,
        "temperature": 0.0 if greedy else generation.temperature,
        "top_p": 1.0 if greedy else generation.top_p,
        "top_k": 0 if greedy else generation.top_k,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": generation.seed,
        "stop_token_ids": list(generation.ends),
        "logprobs": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "stream": False,
    }
