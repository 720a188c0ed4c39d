"""The samplers of LLaDA and of Fast-dLLM, and ours, on one model: tokens per second, and the same.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers==4.46.3 numpy
    git clone https://github.com/ML-GSAI/LLaDA
    git clone https://github.com/NVlabs/Fast-dLLM
    python tests/benchmarks/published_samplers.py --python peers/bin/python --llada LLaDA \
        --fast-dllm Fast-dLLM

Random weights in LLaDA's shape (100 million parameters, vocabulary 126,464), written to disk under
the authors' names and read by each. Seconds are of sampling alone. Writes a record for each
sampler, temperature, dtype and number of rows: tokens per second; ratio, ours over the published
one's; same, the share of tokens that agree, at temperature 0 (above it each has its own noise).
LLaDA's loop takes all rows at once, Fast-dLLM one prompt at a time: `--alone` says on how many it
is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from script import script

from dlmctl.bench.shapes import bench_policy, random_prompts
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import configured
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_original
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob
from dlmctl.settings.sampler import Sampler

DRIVER = Path(__file__).with_name("published_llada.py")
BLOCK = 32
Row = dict[str, Any]


class Published:
    """The published samplers, in a process of their own environment."""

    def __init__(
        self, python: str, model: Path, llada: str, fast_dllm: str, dtype: str, threads: int
    ) -> None:
        command = [python, str(DRIVER), str(model), llada, fast_dllm, dtype, str(threads)]
        # Their environment has other packages than ours.
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        )

    def __call__(self, sampler: str, prompts: list[list[int]], arguments: Row) -> Row:
        """`seconds` and `tokens` of the completions."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        case = {"sampler": sampler, "prompts": prompts, "arguments": arguments}
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # Fast-dLLM's model prints
                answer: Row = json.loads(line)
                return answer
        raise SystemExit("the process of the published samplers has ended; it says why above")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ours(policy: Policy, prompts: list[list[int]], settings: Sampler) -> Row:
    """`seconds` and `tokens` of our sampler."""
    config = configured(policy, settings)
    start = time.perf_counter()
    samples = sample(policy, prompts, list(range(len(prompts))), config)
    return {"seconds": time.perf_counter() - start, "tokens": [made.tokens for made in samples]}


def compared(
    policy: Policy, published: Published, length: int, rows: int, alone: int, temperature: float
) -> Iterator[Row]:
    """A record for each sampler."""
    prompts = random_prompts(policy, rows, length, length)
    theirs: Row = {
        "steps": length // 2,
        "gen_length": length,
        "block_length": min(BLOCK, length),
        "temperature": temperature,
        "mask_id": policy.mask_id,
    }
    plain = Sampler(length, min(BLOCK, length), length // 2, temperature)
    for path, sampler, change, more in (
        ("exact", "llada", {}, {}),
        ("exact", "exact", {}, {}),
        ("prefix", "prefix", {"cache": "prefix"}, {}),
        ("dual", "dual", {"cache": "dual"}, {}),
        (
            "dual+threshold",
            "dual",
            {"cache": "dual", "threshold": 0.9, "steps": None},
            {"threshold": 0.9},
        ),
    ):
        few = prompts if sampler == "llada" else prompts[:alone]
        there = published(sampler, few, {**theirs, **more})
        here = ours(policy, prompts, dataclasses.replace(plain, **change))
        pairs = [
            (a, b)
            for one, other in zip(there["tokens"], here["tokens"], strict=False)
            for a, b in zip(one, other, strict=True)
        ]
        speeds = [len(made["tokens"]) * length / made["seconds"] for made in (there, here)]
        yield {
            "path": path,
            "published": "LLaDA" if sampler == "llada" else "Fast-dLLM",
            "temperature": temperature,
            "rows": rows,
            "theirs": speeds[0],
            "ours": speeds[1],
            "ratio": speeds[1] / speeds[0],
            "same": None if temperature else sum(a == b for a, b in pairs) / len(pairs),
        }


def command(
    python: Annotated[str, Knob("The Python of an environment with transformers 4.46.")],
    llada: Annotated[str, Knob("A clone of LLaDA.")],
    fast_dllm: Annotated[str, Knob("A clone of Fast-dLLM.")],
    model: Annotated[str, Knob("Random weights of this shape.")] = "random:100m",
    length: Annotated[int, Knob("Tokens of a prompt, and of a completion.", minimum=2)] = 64,
    rows: Annotated[str, Knob("Prompts at a time; a comma between numbers.")] = "1,16",
    alone: Annotated[int, Knob("Prompts that Fast-dLLM is timed on.", minimum=1)] = 1,
    temperatures: Annotated[str, Knob("A comma between them.")] = "0,0.9",
    dtypes: Annotated[str, Knob("A comma between them.")] = "float32,bfloat16",
    threads: Annotated[int, Knob("Threads of torch.", minimum=1)] = 2,
) -> None:
    """The samplers of LLaDA and Fast-dLLM, and ours, on one model."""
    torch.set_num_threads(threads)
    weights = bench_policy(model, "cpu", "float32")
    with tempfile.TemporaryDirectory() as folder:
        named = dataclasses.replace(weights, tokenizer=character_tokenizer("0123456789"))
        save_original(named, Path(folder))
        for dtype in dtypes.split(","):
            policy = dataclasses.replace(weights, model=weights.model.to(getattr(torch, dtype)))
            published = Published(python, Path(folder), llada, fast_dllm, dtype, threads)
            ours(policy, [[1] * length], Sampler(length, min(BLOCK, length), length // 2, 0.0))
            for temperature in map(float, temperatures.split(",")):
                for number in map(int, rows.split(",")):
                    made = compared(policy, published, length, number, alone, temperature)
                    write_records({**record, "dtype": dtype} for record in made)
            published.end()


if __name__ == "__main__":
    script(command)()
