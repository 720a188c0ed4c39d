"""What is done to an example before it is run, and what becomes of those that are not run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDUCTIONS = {
    # Machines
    "--nproc-per-node 8": "--nproc-per-node 1",
    "--nproc-per-node 4": "--nproc-per-node 1",
    "--shard 3/8": "--shard 1/2",
    "seq 32": "seq 2",
    "--shard {}/32": "--shard {}/2",
    "samples.{}-of-32.jsonl": "samples.{}-of-2.jsonl",
    "'samples.%g-of-32.jsonl' 32)": "'samples.%g-of-2.jsonl' 2)",
    # Numbers of prompts, completions and tokens
    "dlmctl prompts sudoku |": "dlmctl prompts sudoku -n 2 |",
    "dlmctl prompts sudoku --split test |": "dlmctl prompts sudoku --split test -n 2 |",
    "dlmctl prompts shapes |": "dlmctl prompts shapes -n 1 |",
    "dlmctl rollout |": "dlmctl rollout --prompts 2 -n 2 |",
    "dlmctl rollout -n 8 |": "dlmctl rollout -n 8 --prompts 2 |",
    "dlmctl rollout -n 2 |": "dlmctl rollout -n 2 --prompts 2 |",
    "dlmctl rollout -m runs/vlm |": "dlmctl rollout -m runs/vlm -n 2 |",
    "--follow runs/a --rounds 200": "--follow runs/a --rounds 2 --prompts 2 -n 2",
    "--temperature 1 --rounds 40": "--temperature 1 --rounds 1 --prompts 1 -n 2",
    "--task shapes |": "--task shapes --prompts 1 -n 2 |",
    "--gen-length 256 --steps 128 -n 6": "--gen-length 8 --steps 2 -n 2",
    "--rounds 400 --prompts 16 -n 6": "--rounds 1 --prompts 2 -n 2",
    "--rounds 50 --prompts 32 -n 8": "--rounds 1 --prompts 2 -n 2",
    "--rounds 50 --prompts 64 -n 16": "--rounds 1 --prompts 2 -n 2",
    "--rounds 200 --prompts 8 -n 8 --gen-length 512": "--rounds 1 --prompts 1 -n 2 --gen-length 8",
    "--gen-length 256 --block-length 32 --steps 128": "--gen-length 8 --block-length 8 --steps 2",
    "--gen-length 512 --block-length 32 --steps 512": "--gen-length 8 --block-length 8 --steps 2",
    "-n 3 --gen-length 1024 --block-length 32": "-n 1 --gen-length 8 --block-length 8",
    "--gen-length 256 --threshold 0.9 --cache dual": "--gen-length 8 --threshold 0.9 --cache dual",
    "--gen-length 2000": "--gen-length 8",
    "--inner 12": "--inner 1",
    "-n 6": "-n 2",
    "-n 32": "-n 2",
    "-n 5": "-n 1",
    "-n 13": "-n 1",
    "PROMPTS=2 ROUNDS=2": "PROMPTS=2 ROUNDS=1",
    "-n 64": "-n 2",
    "-n 512": "-n 2",
    "-n 1000": "-n 8",
    "-n 2048": "-n 2",
    "-n 8192": "-n 2",
    "-n 20000": "-n 40",
    "-n 48000": "-n 32",
    "-n 8000": "-n 40",
    "-n 4000": "-n 8",
    "-n 100000": "-n 32",
    "--split test -n 100 |": "--split test -n 1 |",
    "./nightly.sh": "COUNT=2 ./nightly.sh",
    "-b 256": "-b 32",
    "-b 512": "-b 4",
    "-n 8 --split test": "-n 1 --split test",
    "-n 8 --temperature 1": "-n 2 --temperature 1",
    # Autoencoders
    "--layers 1,6,11,16,26,30 -k 50,160": "--layers 26 -k 50,160 --latents 256 --tokens 500",
    "--tokens 200000": "--tokens 1000 --sae-batch-size 100",
    "sae-train acts -k 50,160": "sae-train acts -k 50,160 --latents 256 --tokens 500",
    "--layers 1,5,10 -k 50,160": "--layers 5 -k 50,160 --latents 1280 --tokens 500",
    "--judge GSAI-ML/LLaDA-8B-Instruct": "--judge GSAI-ML/LLaDA-8B-Instruct --gen-length 4",
    "-n 600 --seed 1": "-n 2 --seed 1",
    "--task sudoku --truth solution": "--task sudoku --truth solution --prompts 2",
    "--task sudoku --truth solution --prompts 400": "--task sudoku --truth solution --prompts 2",
    # Distillation and memorization
    "distill teacher": "distill teacher --width 8 --steps 2",
    "distill cd": "distill cd --steps 2",
    "--at 850": "--at 1",
    "memo-eval text": "memo-eval text --steps 1,2 --orders 2",
    "memo-eval theory": "memo-eval theory -d 4 --taus 1:1e6:4",
    "--draws 100": "--draws 8",
    # Measurements
    "tests/benchmarks/credit.py": "tests/benchmarks/credit.py --rounds 3 --prompts 1 -n 2",
    "tests/benchmarks/elbo.py": "tests/benchmarks/elbo.py --repeats 2",
    "--repeats 400": "",
    "tests/benchmarks/neighbours.py": "tests/benchmarks/neighbours.py -n 40 --references 40 "
    "--repeats 1",
    "-n 50000 --references 50000": "",
    "bench rollout --gen-length 256 --steps 64": "bench rollout -m random:tiny --gen-length 32 "
    "--steps 8 --prompts 2",
    "tests/benchmarks/sae.py": "tests/benchmarks/sae.py --width 16 --latents 600 --steps 1 "
    "--sae-batch-size 64 -m random:tiny --layers 0 --context 16 --expansion 20",
    "-m random:8b --layers 1,6,11,16,26,30": "",
    "bench gpu": "bench gpu -m random:tiny --parts rollout,neighbours --prompt-length 8 "
    "--gen-length 8 --block-length 8 --steps 8 --batch-size 2 --vectors 64",
    "bench gpu -m random:100m": "bench gpu -m random:tiny --prompt-length 8 --gen-length 8 "
    "--block-length 8 --steps 8 -n 2 -k 2 --lora-rank 2",
    "bench update": "bench update --prompt-length 8 --repeats 1 -m random:tiny",
    "--gen-length 512": "--gen-length 8",
    "-m random:8b": "",
}
"""Text of examples, and what stands in its place: fewer, smaller, shorter. Nothing else is changed.
Of two that fit the longer is taken."""

STANDS_FOR = {
    "dlmctl rollout test.jsonl": {"test.jsonl": "prompts.jsonl"},
    "-m llada-8b.json --gen-length": {"llada-8b.json": "config.json"},
    "saes/layer26-": {"saes": "saes-of-llada"},
    "update -m GSAI-ML/LLaDA-8B-Instruct": {"verified.jsonl": "of-llada.jsonl"},
    "--image-free train.jsonl": {
        "train.jsonl": "scenes.jsonl",
        "verified.jsonl": "judged-scenes.jsonl",
    },
    "--fail-under accuracy=0.5": {"runs/a": "runs/untrained"},
    "--verifier math": {"samples.jsonl": "answered.jsonl"},
}
"""In an example with this text these files are copies of others."""

EXIT_CODES = {"--fail-under accuracy=0.5": 1, "plain-shares.jsonl": 1}
"""What an example with this text ends with, where that is not 0: the accuracy is not reached, and
the model writes other topics than the corpus."""

NOT_RUN = {
    "accelerate launch": "a command of d1 or dllm",
    "python rl.py": "a command of dLLM-RL",
    "trl grpo": "a command of TRL",
    "trl dpo": "likewise",
    "examples/quickstart.sh": "creates an environment; see test_recipes.py",
    "tests/run.sh": "creates an environment and runs these tests",
    "pip install": "installs packages; see tests/install",
    "pipx install": "likewise",
    "docker build": "needs Docker",
    "tests/benchmarks/sae_training.py": "needs two other libraries",
    "tests/benchmarks/published_samplers.py": "needs clones of LLaDA and Fast-dLLM",
    "tests/benchmarks/published_steps.py": "needs clones of d1 and ESPO",
    "--measure output": "needs more texts than are read here; see tests/sae/test_output_score.py",
    "dlmctl lm-eval": "downloads its tasks; see tests/benchmarks/test_lm_eval.py",
    "dlmctl tensorboard": "needs tensorboard, whose server does not end; see "
    "tests/benchmarks/test_tensorboard.py",
    "--log wandb": "needs wandb; see tests/report/test_trackers.py",
    "dlmctl bench loop": "starts its stages from nothing; see tests/bench/test_loop.py",
    "parallel -j 8": "needs GNU parallel",
    "distill lcm images.jsonl": "needs a model of texts; see tests/distill/test_guided_runs.py",
    "sample runs/lcm": "likewise",
    "memo-eval prompts": "needs a model of texts; see "
    "tests/memorization/images/test_replication.py",
    "--inception": "needs published weights; see tests/memorization/images/test_inception.py",
    "--engine http": "needs inference servers; see tests/engines",
    "--quantize nf4": "needs bitsandbytes; see tests/train/test_quantized_runs.py",
    "--private": "needs the hub; see tests/train/test_hub.py",
    "dlmctl pull": "likewise",
    "ray_shards.py": "needs Ray",
    "make plans": "plans models of billions of parameters; see tests/plan/test_plan.py",
    "make gpus": "likewise",
    "make measure": "has a model of 8 billion parameters",
    "make -C rivals": "goes through six studies",
    "make -j2": "takes hours; see test_recipes.py",
    "make bases": "takes an hour; likewise",
}
"""Examples with this text are only parsed, for this reason."""

_FORMS = "|".join(re.escape(text) for text in sorted(REDUCTIONS, key=len, reverse=True))
PATTERN = re.compile(rf"(?<![\w-])({_FORMS})(?!\S)")
"""Any of them, as whole words."""


def reduced(text: str) -> str:
    """What is run in place of an example."""
    return PATTERN.sub(lambda match: REDUCTIONS[match[1]], text)


def entry(table: Mapping[str, Any], text: str, default: Any = None) -> Any:
    """The value whose key is in a text."""
    return next((value for key, value in table.items() if key in text), default)
