"""Vision-language models under torchrun, where not all records have images."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import invoke, noise_image, read_jsonl, tiny_vision_policy
from ranks import Ranks, same_files, same_metrics, write

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_policy
from dlmctl.models.small_vision import VisionKind
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler

PROMPTS = [
    # A step in which one rank has no image, one with none at all, one with a second image.
    {"id": "one", "prompt": "<image>12?", "images": [noise_image(1)]},
    {"id": "none", "prompt": "12=1=2?"},
    {"id": "text", "prompt": "2=2?"},
    {"id": "more", "prompt": "4?"},
    {
        "id": "two",
        "prompt": "3<image>4<image>?",
        "images": [noise_image(2), noise_image(3, 112, 56)],
    },
    {"id": "last", "prompt": "<image>1?", "images": [noise_image(4, 56, 84)]},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2.5-vl", "--algo grpo --beta 0.1 --batch-size 1"),
        # Features of the image are added in the first blocks too.
        ("qwen3-vl", "--algo grpo --lora-rank 2 --batch-size 3"),
        # The last block of its vision model has no part in anything.
        ("llava", "--algo sft --batch-size 2 --gradient-checkpointing"),
    ],
)
def test_two_ranks_are_as_one(tmp_path: Path, kind: VisionKind, options: str) -> None:
    made = tiny_vision_policy(kind)
    made.model.float()
    save_policy(made, tmp_path / "model")
    policy = load_policy(str(tmp_path / "model"))
    settings = configured(policy, Sampler(temperature=1.0))
    records = list(rollout([Record(p) for p in PROMPTS], policy, settings, 2, 0, 12))
    for number, record in enumerate(records):
        record["reward"] = float(number % 2)
    given = write(tmp_path / "records.jsonl", records)
    steps = 4 if "sft" in options else 2
    line = f"update -m {tmp_path}/model {options} --prompts-per-step {steps} --lr 1e-3 -q"
    alone = invoke(*line.split(), "-o", str(tmp_path / "one"), str(given))
    assert alone.exit_code == 0, alone.output
    done = Ranks(f"{line} -o two", tmp_path, given).done()
    assert len(done) == 3
    same_metrics(read_jsonl(tmp_path / "one" / "metrics.jsonl"), done)
    same_files(tmp_path / "one" / "latest", tmp_path / "two" / "latest")
