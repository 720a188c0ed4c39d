"""What reads the answers of inference servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutations import mutate_json
from target import Target

from dlmctl.records.errors import TryAgainError

REVISION = "0123456789abcdef"
SGLANG = {
    "/model_info": {"model_path": "a/model", "weight_version": "default"},
    "/server_info": {"version": "0.5.9"},
    "/update_weights_from_disk": {"success": True, "message": "done"},
    "/generate": {
        "output_ids": [3, 1],
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 1},
            "weight_version": "default",
            "output_token_logprobs": [[-0.5, 3, None], [-1.5, 1, None]],
            "output_top_logprobs": [[[-0.5, 3, None]], [[-0.25, 2, None]]],
        },
    },
}
VLLM = {
    "/version": {"version": "0.28.0"},
    "/weight_info": {"weight_version": None},
    "/v1/models": {
        "data": [
            {"id": "served", "root": "a/model"},
            {"id": f"{REVISION}.{REVISION}", "root": "an/adapter", "parent": "served"},
        ]
    },
    **{f"/{step}": {"message": "ok"} for step in ("pause", "resume", "start_weight_update")},
    **{f"/{step}": {} for step in ("init_weight_transfer_engine", "finish_weight_update")},
    "/update_weights": {},
    "/v1/completions": {
        "choices": [
            {
                "finish_reason": "stop",
                "token_ids": [3, 1],
                "logprobs": {
                    "token_logprobs": [-0.5, -1.5],
                    "top_logprobs": [{"a": -0.5}, {"b": -0.25, "c": -1.5}],
                },
            }
        ]
    },
}


def engine_targets() -> list[Target]:
    """Both protocols, over a connection that has the input in the place of a server."""
    seeds = [json.dumps(answers).encode() for answers in (SGLANG, VLLM)]
    return [Target("engine", seeds, _engine, mutate_json, 6)]


def _engine(data: bytes, folder: Path) -> None:
    from dlmctl.engines.connection import Connection, Lost, _said
    from dlmctl.engines.protocol import PROBES, Generation, Weights, before_temperature
    from dlmctl.engines.server import recognised

    class Told(Connection):
        def __init__(self) -> None:
            self.url = "http://server"

        def _call(self, method: str, path: str, *rest: Any, **named: Any) -> Any:
            answers = self._parsed(path, data)
            return answers.get(path) if isinstance(answers, dict) else answers

    _said(data)
    try:
        engine = recognised(Told())
        weights = Weights("a/model", folder, REVISION, True)
        engine.take(weights)
        engine.generate(Generation([1, 2], 0, 2, 1.0, 1.0, 0, (1,), 4))
        before_temperature([engine.best_log_prob([1], probe) for probe in PROBES])
        engine.push(weights)
        engine.take(Weights("an/adapter", folder, f"{REVISION}.{REVISION}", True, weights))
    except Lost as error:
        raise TryAgainError(str(error)) from None
