"""SGLang by its native protocol: /generate, /model_info, /update_weights_from_disk.

docs.sglang.io: "Sampling Parameters", "SGLang Native APIs", "SGLang for RL Systems".
"""

from __future__ import annotations

from typing import Any

from dlmctl.engines.connection import Connection, Lost
from dlmctl.engines.protocol import Answer, Engine, Generation, Weights
from dlmctl.records.errors import DataError, UsageError


class SGLang(Engine):
    title = "sglang"
    takes_weights = "an SGLang server takes new weights if its /model_info has weight_version"
    _version: str | None = None
    """Version of the weights that it samples from, if it says one."""

    @classmethod
    def recognised(cls, connection: Connection) -> SGLang | None:
        info = _model_info(connection)
        if not isinstance(info, dict) or "model_path" not in info:
            return None
        server = connection.get("/server_info") or connection.get("/get_server_info")
        version = server.get("version") if isinstance(server, dict) else None
        return cls(connection, str(version or ""))

    def served(self) -> list[Any]:
        return [self._info()["model_path"]]

    def version_of_weights(self) -> str | None:
        info = self._info()
        return str(info["weight_version"] or "") if "weight_version" in info else None

    def push(self, weights: Weights) -> None:
        body = {
            "model_path": str(weights.directory),
            "weight_version": weights.revision,
            "flush_cache": True,
        }
        needed = f"it must see the files of {weights.directory} under this path"
        try:
            said = self.connection.post("/update_weights_from_disk", body)
        except DataError as error:
            raise DataError(f"{error}; {needed}") from None
        if not isinstance(said, dict) or said.get("success") is not True:
            reason = said.get("message") if isinstance(said, dict) else said
            raise DataError(f"{self.connection.url} did not load weights ({reason}); {needed}")

    def take(self, weights: Weights) -> None:
        if weights.base is not None:
            raise UsageError(
                f"{weights.name} is a LoRA adapter, which --engine gives only to vLLM: write whole "
                "weights with 'dlmctl merge', or train without --lora-rank"
            )
        super().take(weights)
        self._version = self.version_of_weights()

    def generate(self, generation: Generation) -> Answer:
        said = self._generate(_body(generation))
        about = said["meta_info"]
        finish = about.get("finish_reason")
        kind = finish.get("type") if isinstance(finish, dict) else None
        if kind == "abort":
            raise Lost(f"{self.connection.url} gave the request up ({finish.get('message')})")
        if str(about.get("weight_version", self._version) or "") != (self._version or ""):
            raise Lost(f"{self.connection.url} has other weights than before")
        scored = about.get("output_token_logprobs")
        if not isinstance(scored, list) or not all(_is_scored(entry) for entry in scored):
            raise self.fault("does not have a log-probability for each token")
        tokens = [entry[1] for entry in scored]
        # The text, and so perhaps these ids, may lack the token that ended it.
        ids = said.get("output_ids")
        if isinstance(ids, list) and ids != tokens[: len(ids)]:
            raise self.fault("has output_ids that are not those of output_token_logprobs")
        return self.checked(generation, tokens, [entry[0] for entry in scored], kind)

    def best_log_prob(self, prompt: list[int], temperature: float) -> float:
        body = _body(Generation(prompt, 0, 1, temperature, 1.0, 0, (), 0))
        said = self._generate({**body, "top_logprobs_num": 1})
        try:
            return float(said["meta_info"]["output_top_logprobs"][0][0][0])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.fault("does not have the log-probability of the best token") from None

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        said = self.connection.post("/generate", body)
        if not isinstance(said, dict) or not isinstance(said.get("meta_info"), dict):
            raise self.fault("has no meta_info")
        return said

    def _info(self) -> dict[str, Any]:
        info = _model_info(self.connection)
        if not isinstance(info, dict) or "model_path" not in info:
            raise self.fault("does not say what model it serves")
        return info


def _model_info(connection: Connection) -> Any:
    """What is served, under its present path or the earlier one."""
    return connection.get("/model_info") or connection.get("/get_model_info")


def _is_scored(entry: Any) -> bool:
    """Whether it is [log-probability, id, text]."""
    return isinstance(entry, list) and len(entry) >= 2


def _body(generation: Generation) -> dict[str, Any]:
    """A request, with what the server or the model might otherwise have defaults for."""
    greedy = generation.greedy
    return {
        "input_ids": generation.prompt,
        "sampling_params": {
            "n": 1,
            "max_new_tokens": generation.length,
            "temperature": 0.0 if greedy else generation.temperature,
            "top_p": 1.0 if greedy else generation.top_p,
            "top_k": -1 if greedy or not generation.top_k else generation.top_k,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "sampling_seed": generation.seed,
            "stop_token_ids": list(generation.ends),
            "no_stop_trim": True,
            "skip_special_tokens": False,
        },
        "return_logprob": True,
        "stream": False,
    }
