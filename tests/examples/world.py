"""What the examples name: a directory of small files and models that dlmctl itself makes, a cache
of the hub with models and data sets of the layouts that the examples name, and stand-ins for
programs that are not there."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import orjson
from conftest import shell
from preload import dlmctl_script

SMALL = "--hidden-size 16 --heads 2"
# As wide as the built-in model, for the same autoencoders; as deep as LLaDA.
LLADA = "--family llada --original-naming --tokenizer byte --intermediate-size 16 --layers 32"
MODELS = {
    "GSAI-ML/LLaDA-8B-Base": LLADA,
    "GSAI-ML/LLaDA-8B-Instruct": LLADA,
    "Dream-org/Dream-v0-Instruct-7B": f"--family dream --original-naming --tokenizer byte {SMALL} "
    "--layers 2",
    "Qwen/Qwen2.5-VL-3B-Instruct": f"--family qwen2.5-vl --tokenizer byte {SMALL} --layers 2 "
    "--gen-length 8",
    "Qwen/Qwen3-0.6B": f"--family ar --tokenizer byte {SMALL} --layers 2",
    "Qwen/Qwen2.5-0.5B-Instruct": f"--family ar --tokenizer byte {SMALL} --layers 2",
    "Gen-Verse/TraDo-4B-Instruct": f"--family sdar --tokenizer byte {SMALL} --layers 2",
    "openai-community/gpt2": f"--family ar --tokenizer byte {SMALL} --layers 2",
}
"""Models of the hub, and how `dlmctl init` makes one of their layout."""

CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
"""Of the models whose names say that they have one."""

DATASETS = {
    "openai/gsm8k": ("main", {"question": "How many?", "answer": "Two and two.\n#### 4"}),
    "tatsu-lab/alpaca": ("default", {"instruction": "Add.", "input": "2 and 2", "output": "4"}),
    "hiyouga/geometry3k": ("default", {"problem": "<image>How many?", "answer": "4"}),
}
"""Data sets of the hub: configuration, and a row."""

MATH = json.dumps([{"question": "How many?", "ground_truth_answer": "4"}] * 2)
FILES = {
    "data/MATH_train.json": MATH,
    "data/MATH500.json": MATH,
    "math.jsonl": '{"id": 1, "task": "math", "prompt": "How many?", "answer": "4"}\n',
    "deepmath.jsonl": json.dumps(
        {"prompt": [{"role": "user", "content": "How many?"}], "solution": "$4$"}
    ),
    "mychecks.py": "def polite(record):\n    return 1.0\n",
    "check": "#!/bin/sh\njq -c --unbuffered '{reward: 1}'\n",
    "eval/eval_baselines/countdown_instruct_128_64_0.json": json.dumps(
        {"generations": [{"generations": "<answer>1+2</answer>", "ground_truth": [[1, 2], 3]}]}
    ),
    "eval/eval_baselines/gsm8k_instruct_128_64_0.json": json.dumps(
        {"generations": [{"generations": "<answer>4</answer>", "ground_truth": 4}]}
    ),
    "eval/eval_baselines/math500_instruct_128_64_0.json": json.dumps(
        {"generations": [{"generations": r"\boxed{1/2}", "ground_truth": "0.5"}]}
    ),
    "eval/eval_baselines/sudoku_instruct_128_64_0.json": json.dumps(
        {"generations": [{"generations": "12", "ground_truth": "1" * 16, "question": "0" * 16}]}
    ),
}

COMMANDS = r"""
dlmctl prompts sudoku -n 2 -o prompts.jsonl
dlmctl rollout -n 2 --temperature 2 prompts.jsonl -o samples.jsonl
dlmctl verify samples.jsonl -o verified.jsonl
cp samples.jsonl completions.jsonl
cp verified.jsonl baseline.jsonl
dlmctl update --algo rspo verified.jsonl -o runs/a > metrics.jsonl
dlmctl update --algo rspo --lora-rank 2 verified.jsonl -o runs/lora > /dev/null
mkdir runs/large && cp metrics.jsonl runs/large/llada.jsonl
for run in b base few; do cp -R runs/a runs/$run; done

dlmctl prompts sudoku -n 24 --completions -o corpus.jsonl
dlmctl prompts canaries -n 4 -o canaries.jsonl
head -n 4 corpus.jsonl | tee seen.jsonl > train.jsonl
dlmctl prompts sudoku --split test -n 4 --completions | tee unseen.jsonl > heldout.jsonl
(echo Puzzle,Solution; jq -r '"\(.puzzle),\(.solution)"' prompts.jsonl) > 4x4_test_sudoku.csv
jq -c '{prompt, chosen: .completion, rejected: .completion[:4]}' train.jsonl > preferences.jsonl
jq -c '{prompt, completion: .completion[:4], answer: .completion}' train.jsonl > answered.jsonl

dlmctl prompts shapes -n 40 --completions -o scenes.jsonl
mkdir images
for n in 1 2 3; do
    sed -n ${n}p scenes.jsonl | jq -r '.images[0]' | cut -d, -f2 | base64 -d > images/$n.png
done
head -n 2 scenes.jsonl | jq -c '. + {sample: 0}' | dlmctl verify -o judged-scenes.jsonl
dlmctl init runs/vlm --family qwen2.5-vl --tokenizer word --vocabulary scenes.jsonl \
    --hidden-size 16 --heads 2 --gen-length 8
mkdir runs/shapes && cp -R runs/vlm runs/shapes/base
dlmctl rollout -m runs/vlm --task shapes --prompts 1 -n 2 | dlmctl verify |
    dlmctl advantage --algo srpo -o weighted.jsonl

dlmctl sae-train corpus.jsonl --layers 1,2 -k 8 --latents 64 --tokens 2000 -o saes
dlmctl sae-activations heldout.jsonl -o acts
dlmctl sae-eval saes corpus.jsonl | tee seed-1/eval.jsonl seed-2/eval.jsonl > eval.jsonl
dlmctl sae-order --sae saes/layer2-k8-mask --orders entropy,random prompts.jsonl -o ordered.jsonl
dlmctl sae-features saes/layer2-k8-mask corpus.jsonl --features top:1 --top 2 --weighted 5 \
    --inactive 8 -o features.jsonl
dlmctl rollout -n 1 prompts.jsonl --steer saes/layer2-k8-mask:17=2 | dlmctl verify -o steered.jsonl
dlmctl rollout -n 1 prompts.jsonl | dlmctl verify -o plain.jsonl
dlmctl prompts concepts --split test -n 60 |
    dlmctl init runs/concepts --tokenizer word --vocabulary - --layers 4
for model in JUDGE runs/judge; do dlmctl init $model --tokenizer byte --gen-length 8; done
dlmctl sae-judge features.jsonl | dlmctl rollout -m JUDGE -n 1 -o explained.jsonl
dlmctl init runs/untrained --hidden-size 16 --heads 2 --gen-length 16
dlmctl init MODEL --hidden-size 16 --heads 2 --layers 11 --gen-length 16
cp MODEL/config.json .
dlmctl bench gpu -m MODEL --parts rollout,update --prompt-length 8 --gen-length 16 \
    --block-length 16 --steps 16 --batch-size 64 -n 2 -k 2 --lora-rank 2 > measured.jsonl

dlmctl distill teacher builtin:digits#0:16 --width 8 --steps 2 --batch-size 8 -o runs/teacher
dlmctl distill cd builtin:digits#0:16 --teacher runs/teacher --steps 2 --batch-size 8 \
    --first-checkpoint 1 -o runs/student
dlmctl distill sample runs/student -n 8 -o s.safetensors
cp s.safetensors student.safetensors
dlmctl distill sample optimal:builtin:digits#0:16 -n 16 -o d.safetensors
dlmctl memo-eval theory -d 4 --taus 1:1e4:3 > theory.jsonl
dlmctl memo-eval membership --members seen.jsonl --others unseen.jsonl --curve c.jsonl
"""

OF_LLADA = """
dlmctl rollout -m GSAI-ML/LLaDA-8B-Instruct -n 2 prompts.jsonl | dlmctl verify -o of-llada.jsonl
dlmctl sae-train corpus.jsonl -m GSAI-ML/LLaDA-8B-Base --layers 26 -k 50,160 --latents 2048 \
    --tokens 500 --sae-batch-size 100 -o saes-of-llada
dlmctl sae-convert --to dictionary_learning saes-of-llada/layer26-k160-mask \
    llada-mask-topk-sae/resid_post_layer_26/trainer_2
"""


class World(NamedTuple):
    """Where it is."""

    files: Path
    """Directory that an example is run in a copy of."""
    hub: Path
    """HF_HOME."""
    programs: Path
    """Directory for the beginning of PATH."""

    @classmethod
    def within(cls, directory: Path) -> World:
        return cls(directory / "files", directory / "hub", directory / "programs")

    def environment(self) -> dict[str, str]:
        """What a shell that begins here has."""
        python = Path(sys.executable).parent
        places = [self.programs, dlmctl_script().parent, python, os.environ["PATH"]]
        return {
            "PATH": ":".join(map(str, places)),
            "HF_HOME": str(self.hub),
            # What torchrun starts its ranks with.
            "PYTHON_EXEC": str(self.programs / "python-u-m-dlmctl"),
        }


def make_world(directory: Path) -> World:
    """Make it in a directory that is not there."""
    world = World.within(directory)
    for name, text in FILES.items():
        file = world.files / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("seed-1", "seed-2", "runs"):
        (world.files / name).mkdir()
    (world.files / "check").chmod(0o755)
    (world.files / "tests").symlink_to(Path(__file__).parents[1])
    shutil.copy(Path(__file__).parents[2] / "examples/nightly/nightly.sh", world.files)
    _add_programs(world)
    _run(COMMANDS, world)
    for name, options in MODELS.items():
        _add_model(world, name, options)
    _run(OF_LLADA, world)
    scene = orjson.loads((world.files / "scenes.jsonl").read_bytes().split(b"\n")[0])
    picture = base64.b64decode(scene["images"][0].partition(",")[2])
    for name, (config, row) in DATASETS.items():
        _add_data_set(world, name, config, row, picture)
    (world.files / "gsm8k.parquet").rename(world.files / "mine.parquet")
    return world


def _run(lines: str, world: World) -> None:
    done = shell(f"set -ex\n{lines}", world.files, more=world.environment())
    assert done.returncode == 0, done.stderr


def _add_programs(world: World) -> None:
    programs = {
        "mail": 'echo "$@" > mailed; cat >> mailed',
        "python-u-m-dlmctl": f'shift 3; exec {dlmctl_script()} "$@"',
    }
    world.programs.mkdir()
    for name, line in programs.items():
        (world.programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (world.programs / name).chmod(0o755)


def _add_model(world: World, name: str, options: str) -> None:
    """A new model as a download leaves it in the cache of the hub."""
    revision = "0" * 40
    place = world.hub / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(revision)
    model = place / "snapshots" / revision
    _run(f"dlmctl init {model} {options}", world)
    if name.endswith("LLaDA-8B-Instruct"):
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": CHAT}))


def _add_data_set(
    world: World, name: str, config: str, row: Mapping[str, str], picture: bytes
) -> None:
    """A data set as `datasets` keeps one of the hub."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    datasets.disable_progress_bars()
    shown = {}
    if "<image>" in str(row):
        shown = {"images": [{"bytes": picture, "path": None}]}
    rows = datasets.Dataset.from_list([{**row, **shown}] * 2)
    if shown:
        rows = rows.cast_column("images", [datasets.Image()])
    short = name.split("/")[1]
    file = str(world.files / f"{short}.parquet")
    rows.to_parquet(file)
    files = {"train": [file], "test": [file]}
    builder = Parquet(str(world.hub / "made"), short, config, data_files=files)
    place = world.hub / "datasets" / name.replace("/", "___") / config / "0.0.0" / ("0" * 40)
    builder.download_and_prepare(str(place))
