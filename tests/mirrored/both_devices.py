"""Command lines on the CPU and on a mirrored CUDA device, in this directory.

Models and records for them are made first, on the CPU. Then each line of standard input is a case:
commands of dlmctl joined by &&, with OUT for what they write. The answer is a line of JSON that
has for each device where the outputs are, the exit code, what was said on standard error, the
operations on tensors of two devices, and the number of kernels.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import mirror  # before torch
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner, Result

from dlmctl.cli import app
from dlmctl.models.loading import load_policy

torch.set_num_threads(1)

SIZES = "--tokenizer byte --hidden-size 16 --heads 2 --gen-length 8 --block-length 4 --steps 4"
MADE = f"""
init llada {SIZES}
init other {SIZES} --seed 1
init dream --family dream {SIZES}
init ar --family ar {SIZES}
init vl --family qwen2.5-vl {SIZES}
prompts sudoku -n 2 -o prompts.jsonl
prompts sudoku -n 4 --completions -o solved.jsonl
prompts concepts -n 16 -o texts.jsonl
prompts shapes -n 2 -o shapes.jsonl
rollout prompts.jsonl -m llada -n 4 -o plain.jsonl
rollout prompts.jsonl -m llada -n 4 --block-length 1 --steps 8 -o one-by-one.jsonl
rollout prompts.jsonl -m ar -n 4 -o plain-ar.jsonl
rollout shapes.jsonl -m vl -n 4 -o plain-vl.jsonl
sae-train texts.jsonl -m llada --layers 1 -k 4 --latents 32 --tokens 512 --sae-batch-size 64 \
  --positions mask,unmask,all -o saes
sae-features saes/layer1-k4-mask texts.jsonl --features top:2 -o features.jsonl
rollout prompts.jsonl -m llada -n 4 --steer saes/layer1-k4-mask:3=2 -o steered.jsonl
distill teacher builtin:digits#0:16 --network unet --width 8 --multipliers 1,2 --attention 2 \
  --steps 2 --first-checkpoint 1 -b 8 -o teacher
distill sample teacher -n 16 --steps 2 -o images.safetensors
"""
MODELS = {"plain": "llada", "one-by-one": "llada", "plain-ar": "ar", "plain-vl": "vl"}
LAYOUT = "<description>{0} 2</description><think>{0}</think>\\boxed{{3}}"


def main() -> None:
    for line in MADE.replace("\\\n", "").strip().splitlines():
        done = run(line, "cpu")
        assert done.exit_code == 0, f"{line}: {done.output}"
    for name in MODELS:
        reward(name)
    extractor(Path("extractor"))
    pictures_of_texts(Path("pictures"))
    print("ready", flush=True)
    for number, lines in enumerate(sys.stdin):
        report = {device: ran(lines, device, f"case-{number}") for device in ("cpu", "cuda")}
        print(json.dumps(report), flush=True)


def run(line: str, device: str) -> Result:
    return CliRunner().invoke(app, line.split(), env={"DLMCTL_DEVICE": device})


def reward(name: str) -> None:
    """Give every other completion a reward, in NAME.rewarded.jsonl.

    NAME.credited.jsonl has completions in the layout that `advantage --algo srpo` reads.
    """
    rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
    for row in rows:
        row["reward"] = float(row["sample"] % 2)
    write(f"{name}.rewarded.jsonl", rows)
    encode = load_policy(MODELS[name], "cpu").encode_text
    for row in rows:
        row["completion"] = LAYOUT.format(row["sample"])
        row["tokens"]["completion"] = encode(row["completion"])
        row["rollout"].pop("log_probs", None)
    write(f"{name}.credited.jsonl", rows)


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def extractor(directory: Path) -> None:
    """A model of features of images."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(directory)
    about = {"size": {"height": 32, "width": 32}}
    (directory / "preprocessor_config.json").write_text(json.dumps(about))


def pictures_of_texts(directory: Path) -> None:
    """A text-to-image pipeline of diffusers, and images with their texts in captioned.jsonl."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
    from tiny_pipelines import save_text_pipeline

    save_text_pipeline(directory)
    for name in ("a", "bed"):
        Image.new("RGB", (16, 16), (80, 40, 10 * len(name))).save(f"{name}.png")
    write("captioned.jsonl", [{"image": f"{name}.png", "text": name} for name in ("a", "bed")])


def ran(lines: str, device: str, name: str) -> dict[str, Any]:
    """A report of commands on a device, until one fails."""
    place = Path(name)  # the same for both, since records name it
    place.mkdir()
    said, code = "", 0
    with mirror.mirrored() if device == "cuda" else nullcontext(mirror.Ledger()) as ledger:
        for line in lines.replace("OUT", f"{place}/out").split(" && "):
            done = run(line, device)
            with (place / "printed.jsonl").open("a") as printed:
                printed.write(done.stdout)
            said += done.stderr
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                said += "".join(traceback.format_exception(done.exception))
            code = done.exit_code
            if code:
                break
    return {
        "at": str(place.rename(f"{name}-{device}").absolute()),
        "exit": code,
        "said": said,
        "mixes": ledger.mixes,
        "kernels": ledger.kernels,
    }


main()
