"""What the tests of `rollout --engine` share: a model, prompts, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import torch
from conftest import invoke

from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.settings.small import SmallModel

KINDS = ["sglang", "vllm"]
SAMPLES, LONGEST = 3, 8
PROMPTS = ["12=", "4+", "1", "203=1"]


def save_model(directory: Path, seed: int, family: str = "ar") -> str:
    """A small model whose weights are large enough to have opinions."""
    small = SmallModel(family, 16, 2, 2, gen_length=LONGEST)
    policy = make_policy(small, character_tokenizer("01234=+"), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.4, generator=generator)
    save_policy(policy, directory)
    return str(directory)


def write_prompts(directory: Path) -> Path:
    lines = [orjson.dumps({"id": f"p{n}", "prompt": text}) for n, text in enumerate(PROMPTS)]
    (directory / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return directory / "prompts.jsonl"


def sampled(prompts: Path, model: str, *options: str | int) -> list[dict[str, Any]]:
    done = rolled(prompts, model, *options)
    assert done.exit_code == 0, done.stderr
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def rolled(prompts: Path, model: str, *options: str | int) -> Any:
    usual = ["--raw", "-n", SAMPLES, "--gen-length", LONGEST, "-m", model]
    return invoke("rollout", prompts, *usual, *options)


def said_once(done: Any) -> str:
    """The one line that a command says about what went wrong."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("dlmctl: what was")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def scored(model: str, records: list[dict[str, Any]]) -> list[list[float]]:
    """Log-probabilities at temperature 1 of each completion, in one pass."""
    policy = load_policy(model, "cpu", "float32")
    tables = []
    for record in records:
        prompt, tokens = record["tokens"]["prompt"], record["tokens"]["completion"]
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + tokens])).logits[0].double()
        rows = logits[len(prompt) - 1 : -1].log_softmax(1)
        tables.append(rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())
    return tables
