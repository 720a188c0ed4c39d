"""Every command that computes, on a CUDA device that is not there (mirror.py), as on the CPU.

It refuses operations on tensors of two devices, as CUDA does; where the CPU computes the same, the
results are equal.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import orjson
import pytest
import torch
from safetensors.torch import load_file

from dlmctl.cli import SUBCOMMANDS, functions
from dlmctl.settings.algorithms import Algorithm
from dlmctl.settings.families import Variant, family_of_variant

HERE = Path(__file__).parent
LENGTHS = "--gen-length 8 --block-length 4 --steps 4"
SAE = "--layers 1 -k 4 --latents 32 --tokens 512 --sae-batch-size 64 --dead-after 100"
IMAGES = "builtin:digits#0:16"
NETWORK = "--network unet --width 8 --multipliers 1,2 --attention 2"

ROLLOUTS = [
    "--temperature 0",
    "--temperature 0.9 -b 3",
    "--dtype bfloat16",
    "--dtype float16 --cache prefix",
    "--cache dual --threshold 0.9 --refresh-below 0.5",
    "--cfg-scale 1 --top-p 0.9 --top-k 20",
    "--remasking sae --sae saes/layer1-k4-all",
    "--steer saes/layer1-k4-mask:3=2 --steer-scope all",
    "--steer saes/layer1-k4-mask:3=2 --steer-scope topk",
    "--steer saes/layer1-k4-mask:3=2 --steer-scope update --dtype bfloat16",
]
LINES = [
    *(f"rollout prompts.jsonl -m llada -n 2 -o OUT {options}" for options in ROLLOUTS),
    "rollout prompts.jsonl -m dream -n 2 --cache dual -o OUT",
    "rollout prompts.jsonl -m ar -n 2 --temperature 0 --dtype bfloat16 -o OUT",
    "rollout shapes.jsonl -m vl -n 2 --corrupt noise -o OUT",
    "chat llada 0031102001033400= --once",
    "chat ar 0031102001033400= --once --json",
    "score-elbo plain.jsonl -m policy=llada -m reference=other -o OUT",
    "score-elbo plain-ar.jsonl -m ar -o OUT",
    "score-elbo plain-vl.jsonl -m vl --dtype bfloat16 -o OUT",
    "advantage --algo srpo plain.credited.jsonl -o OUT",
    "advantage --algo srpo plain-vl.credited.jsonl --visual-signal full-kl -o OUT",
    "update --algo rspo -m llada --dtype bfloat16 plain.rewarded.jsonl -o OUT",
    "update --algo rspo -m llada --dtype bfloat16 --lora-rank 4 --gradient-checkpointing"
    " plain.rewarded.jsonl -o OUT",
    "update --algo rspo -m llada --dtype bfloat16 --lora-rank 4 --lora-dropout 0.1"
    " plain.rewarded.jsonl -o OUT",
    "update --algo grpo -m ar plain-ar.rewarded.jsonl -o OUT",
    "update --algo sft -m ar solved.jsonl -o OUT",
    "update --algo sft -m ar --family a2d --anneal-attention 4 solved.jsonl -o OUT",
    "update --algo sft -m vl plain-vl.jsonl -o OUT",
    # A run that is resumed reads its optimizer and the state of the device's generator.
    "update --algo rspo -m llada plain.rewarded.jsonl -o OUT"
    " && update --any-policy --algo rspo plain.rewarded.jsonl -o OUT"
    " && rollout prompts.jsonl -m OUT -n 2 -o OUT.jsonl",
    # The second batch is scored under weights that wait on the CPU.
    "update --algo diffu-grpo --inner 1 -m llada plain.rewarded.jsonl -o OUT"
    " && rollout prompts.jsonl -m OUT -n 2 -o OUT.jsonl && verify OUT.jsonl -o OUT-verified.jsonl"
    " && update --algo diffu-grpo --inner 1 --keep-zero-adv --prompts-per-step 1"
    " OUT-verified.jsonl -o OUT",
    "update --algo sft -m llada --lora-rank 4 solved.jsonl -o OUT"
    " && rollout prompts.jsonl -m OUT -n 2 -o OUT.jsonl && merge -m OUT -o OUT-merged",
    f"sae-train texts.jsonl -m llada {SAE} --positions mask,unmask,all,clean -o OUT",
    f"sae-train texts.jsonl -m llada {SAE} --layers 0,1 --aux input --drop-norms 5 --k-start 16"
    " --dtype bfloat16 -o OUT",
    "sae-activations texts.jsonl -m llada --layers 1 -o OUT"
    f" && sae-train OUT {SAE} --kind matryoshka --prefixes 1/4,1/2 -o OUT-saes",
    "sae-eval saes texts.jsonl",
    "sae-eval saes texts.jsonl --scope matching --control pca --keep-first",
    "sae-eval saes texts.jsonl --control gaussian --no-ablate",
    "sae-eval saes/layer1-k4-mask saes/layer1-k4-unmask texts.jsonl --scope both",
    "sae-eval saes/layer1-k4-mask texts.jsonl --tuned other",
    "sae-stability saes/layer1-k4-mask texts.jsonl --tuned other",
    "sae-features saes/layer1-k4-mask texts.jsonl --features top:2 -o OUT",
    "sae-order --sae saes/layer1-k4-all -m llada prompts.jsonl -n 1"
    " --orders low_confidence,random -o OUT",
    "sae-probe saes texts.jsonl",
    "sae-judge features.jsonl --judge llada --gen-length 8 -o OUT",
    "sae-steering steered.jsonl --baseline plain.jsonl --concept digits --judge llada"
    " --judge-length 4 --fluency other",
    "sae-steering steered.jsonl --baseline plain.jsonl --fluency ar",
    "distill masked plain.jsonl -m llada --rounds 2 --steps-per-round 1 --records-per-step 4"
    " -o OUT",
    "distill masked plain.jsonl -m llada --order trajectory --lora-rank 4 --rounds 1"
    " --steps-per-round 1 --records-per-step 4 --dtype bfloat16 -o OUT",
    f"distill teacher {IMAGES} --steps 2 -b 8 {NETWORK} --first-checkpoint 1 -o OUT",
    f"distill teacher {IMAGES} --network mlp --steps 2 -b 8 --width 8 --first-checkpoint 1 -o OUT",
    f"distill teacher shapes.jsonl --resize 16 --crop 16 {NETWORK} --flip --dropout 0.2"
    " --steps 2 -b 4 --first-checkpoint 1 -o OUT",
    f"distill cd {IMAGES} --teacher teacher --steps 2 -b 8 --first-checkpoint 1 -o OUT"
    " && distill sample OUT -n 16 --steps 2 -o OUT.safetensors",
    f"distill cd {IMAGES} --objective ct --init scratch --network mlp --steps 2 -b 8 --width 8"
    " -o OUT",
    f"distill cd {IMAGES} --objective ect --init scratch --steps 2 -b 8 {NETWORK} -o OUT",
    "distill sample teacher -n 16 --steps 2 -o OUT.safetensors",
    "distill lcm captioned.jsonl --teacher pictures --steps 2 -b 2 --guidance-size 16 -o OUT"
    " && distill sample OUT --prompts captioned.jsonl -n 2 --steps 2 -o OUT.safetensors",
    "memo-eval samples --samples images.safetensors --train builtin:digits#0:32"
    " --heldout builtin:digits#32:64 --rows OUT",
    "memo-eval samples --samples images.safetensors --train builtin:digits#0:32 --dedup"
    " --space pca:4 --extractor extractor --rows OUT",
    "memo-eval prompts -m pictures captioned.jsonl -n 3 --clique-size 2 --steps 2 -b 2 --rows OUT",
    "memo-eval text --mode prefix,suffix,random -n 2 --orders 2 --steps 2 --heldout plain.jsonl"
    " solved.jsonl -m llada --rows OUT",
    "memo-eval membership --members solved.jsonl --others plain.jsonl -m llada"
    " --method loss,ratio,zlib,sama --reference other --bootstrap 10",
    "memo-eval theory -d 10",
    "memo-eval copies plain.jsonl --train solved.jsonl -m llada",
    f"bench rollout -m llada prompts.jsonl {LENGTHS} --paths exact,dual+threshold",
    f"bench gpu -m llada {LENGTHS} --prompt-length 8 --parts rollout,scoring,update,sae,neighbours"
    " --batch-size 2 -n 2 -k 2 --lora-rank 2 --update-batch-size 4 --latents 32 --vectors 16",
    "bench update -m llada --gen-length 8 --prompt-length 8 --repeats 1 --batch-size 8",
]
RECORDS = {
    "justgrpo": "-m llada one-by-one.rewarded.jsonl",
    "sft": "-m llada solved.jsonl",
    "srpo": "-m vl OUT.jsonl",
}
"""What algorithms learn from that do not take any completions with rewards."""


def trained(algo: str) -> str:
    records = RECORDS.get(algo, "-m llada plain.rewarded.jsonl")
    inner = "" if algo == "sft" else "--inner 2 "  # the second has ratios other than 1
    line = f"update --algo {algo} {inner}{records} -o OUT"
    credit = "advantage --algo srpo plain-vl.credited.jsonl -o OUT.jsonl && "
    return credit + line if algo == "srpo" else line


def sampled(variant: str) -> str:
    sizes = "--tokenizer byte --hidden-size 16 --heads 2"
    prompts = "shapes" if family_of_variant(variant) == "vlm" else "prompts"
    return (
        f"init OUT --family {variant} {sizes}"
        f" && rollout {prompts}.jsonl -m OUT -n 2 {LENGTHS} -o OUT.jsonl"
    )


WITHOUT = ("memo-eval theory", "memo-eval copies")
"""What computes on the CPU whatever the device."""
CASES = [*LINES, *map(trained, get_args(Algorithm)), *map(sampled, get_args(Variant))]
MEASURED = {"seconds", "tokens_per_second", "peak_memory_mb", "revision"}
"""Fields that differ between any two runs, or with the last bit of a weight."""


@pytest.fixture(scope="module")
def ask(guard, tmp_path_factory):
    """Runs a case on both devices, in a process that prepared what it reads."""
    command = [sys.executable, HERE / "both_devices.py"]
    place = tmp_path_factory.mktemp("both")
    environment = os.environ | {"DLMCTL_TEST_GUARD": str(guard), "DLMCTL_DTYPE": "float32"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=place, env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"

        def answer(case: str) -> dict:
            print(case, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield answer
        process.stdin.close()


def results(place: str) -> dict:
    """What a case wrote, by file: lines of JSON, or tensors."""
    files = [path for path in sorted(Path(place).rglob("*")) if path.is_file()]
    return {str(path.relative_to(place)): content(path) for path in files}


def content(path: Path):
    if path.suffix == ".safetensors":
        return {name: x for name, x in load_file(path).items() if name != "random.cuda"}
    try:
        return [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except orjson.JSONDecodeError:
        return None


def tolerance(case: str) -> float:
    """Relative difference of floats that the CPU may have.

    Halves and, on CUDA, products of autoencoders are rounded elsewhere; a completion sampled in
    halves may be another. What bench measures is not the same twice.
    """
    if case.startswith("bench"):
        return float("inf")
    if "--dtype" in case:
        return float("inf") if "rollout" in case else 0.1
    return 0.05 if "sae-train" in case else 1e-3


def differences(made, expected, limit, path=""):
    """Places where two results differ by more than the rounding of their floats."""
    if isinstance(expected, (dict, list)):
        pairs = [x.items() if isinstance(x, dict) else enumerate(x) for x in (made, expected)]
        made, expected = ({name: x for name, x in pair if name not in MEASURED} for pair in pairs)
        if made.keys() != expected.keys():
            yield f"{path}: {sorted(made)} and not {sorted(expected)}"
        for name in made.keys() & expected.keys():
            yield from differences(made[name], expected[name], limit, f"{path}/{name}")
    elif isinstance(expected, torch.Tensor):
        if not close(made, expected, exact=limit < 0.05):
            yield path
    elif isinstance(expected, float):
        # A KL near 0 is a difference of log-likelihoods of some ten nats in float32.
        if made != pytest.approx(expected, limit, 1e-5):
            yield f"{path}: {made} and not {expected}"
    elif made != expected and limit < 1:
        yield f"{path}: {made} and not {expected}"


def close(made: torch.Tensor, expected: torch.Tensor, exact: bool) -> bool:
    """A gradient near 0 may turn its sign, and with it a step of Adam: not many at once."""
    if (made.shape, made.dtype) != (expected.shape, expected.dtype) or not made.isfinite().all():
        return False
    size, difference = (
        x.double().square().mean().sqrt() for x in (expected, made.double() - expected.double())
    )
    return not exact or bool(difference <= 2e-6 * (1 + size))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_command_computes_on_cuda_what_it_does_on_the_cpu(ask, case):
    report = ask(case)
    for device in report.values():
        assert (device["exit"], device["mixes"]) == (0, []), device["said"]
    assert (report["cuda"]["kernels"] > 0) != case.startswith(WITHOUT), "it computed elsewhere"
    expected, made = (results(report[device]["at"]) for device in ("cpu", "cuda"))
    found = [*differences(made, expected, tolerance(case))]
    assert not found, "\n".join(found)


def test_every_command_with_an_option_for_the_device_is_in_a_case():
    """But 'bench loop', which starts processes, and 'lm-eval', which needs a package."""
    tried = {line for case in CASES for line in case.split(" && ")}
    for name in SUBCOMMANDS:
        for full, function in functions(name).items():
            takes = "device" in inspect.signature(function).parameters and full != "bench loop"
            assert not takes or any(line.startswith(f"{full} ") for line in tried), full
