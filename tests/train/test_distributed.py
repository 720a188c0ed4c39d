"""Ranks under torchrun: the steps, and the files, are those of one process."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import invoke, read_jsonl
from ranks import Ranks, same_files, same_metrics, write

from dlmctl.diffusion import elbo
from dlmctl.diffusion.elbo import Example, own_micro_batches
from dlmctl.diffusion.masks import MaskSet
from dlmctl.models.loading import load_policy

STEPS = "--batch-size 3 --lr 1e-3 --warmup 3 --grad-norm 0.5 -q"
COMMON = f"--prompts-per-step 2 {STEPS}"


def verified(steps: int) -> list[dict]:
    """Two groups of two samples for each step, of different lengths."""
    return [
        {
            "id": f"p{number // 2}",
            "sample": number % 2,
            "reward": float(number % 3 == 0),
            "tokens": {
                "prompt": [3 + number // 2 % 7, 8],
                "completion": [3 + (number * k) % 11 for k in range(3 + number % 3)],
            },
            "rollout": {"samples": 2},
        }
        for number in range(4 * steps)
    ]


def back_to(run: Path, step: int, copy: Path) -> None:
    """A run as it was after that step."""
    shutil.copytree(run, copy, symlinks=True)
    (copy / "latest").unlink()
    (copy / "latest").symlink_to(f"step-{step:06d}")


def test_two_ranks_are_as_one_and_a_run_resumes_at_another_number_of_them(tmp_path, saved_models):
    records = verified(3)
    line = f"update -m {saved_models('llada')} {COMMON} --lambda 0.05 -k 2 --save-every 2 --keep 9"
    given = write(tmp_path / "all.jsonl", records)
    alone = invoke(*line.split(), "-o", tmp_path / "one", given)
    assert alone.exit_code == 0, alone.output
    made = Ranks(f"{line} -o two", tmp_path, given).done()
    expected = read_jsonl(tmp_path / "one" / "metrics.jsonl")
    assert [m["step"] for m in expected] == [1, 2, 3]
    assert expected[2]["kl"] != 0
    same_metrics(expected, made)
    same_metrics(expected, read_jsonl(tmp_path / "two" / "metrics.jsonl"))
    for step in ("step-000002", "step-000003"):
        same_files(tmp_path / "one" / step, tmp_path / "two" / step)

    rest = write(tmp_path / "rest.jsonl", records[8:])
    back_to(tmp_path / "one", 2, tmp_path / "one-three")
    back_to(tmp_path / "two", 2, tmp_path / "two-one")
    assert invoke(*line.split(), "-o", tmp_path / "two-one", rest).exit_code == 0
    Ranks(f"{line} -o one-three", tmp_path, rest, count=3).done()  # shares of unequal size
    for name in ("one-three", "two-one"):
        same_metrics(expected, read_jsonl(tmp_path / name / "metrics.jsonl"))
        same_files(tmp_path / "one" / "latest", tmp_path / name / "latest")


def test_other_subcommands_are_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = invoke("stats", os.devnull)
    assert refused.exit_code == 2
    assert "torchrun is for" in refused.output


@pytest.mark.parametrize(
    ("family", "options"),
    [
        # One masked sequence in a step: the second rank has nothing to do but must take part.
        (
            "mlm",
            "update --algo sft --prompts-per-step 1 --masks full -k 1 --gradient-checkpointing "
            "--ema 0.9",
        ),
        # An adapter; ratios to the old policy and a penalty, in several steps on a batch.
        ("ar", "update --algo grpo --prompts-per-step 2 --beta 0.1 --inner 2 --lora-rank 4"),
        # Two rounds, the target of the second being the student behind the first.
        ("a2d", "distill masked --records-per-step 3 --rounds 2 --steps-per-round 1 --ema 0.9"),
    ],
)
def test_other_objectives_and_models(tmp_path, saved_models, family, options):
    given = write(tmp_path / "all.jsonl", verified(2)[: 3 if "sft" in options else None])
    line = f"{options} -m {saved_models(family)} {STEPS}"
    alone = invoke(*line.split(), "-o", tmp_path / "one", given)
    assert alone.exit_code == 0, alone.output
    made = Ranks(f"{line} -o two", tmp_path, given).done()
    same_metrics(read_jsonl(tmp_path / "one" / "metrics.jsonl"), made)
    same_files(tmp_path / "one" / "latest", tmp_path / "two" / "latest")


@pytest.mark.parametrize("adapter", ["", "--lora-rank 4"])
def test_ratios_to_the_weights_that_sampled_a_round(tmp_path, saved_models, adapter):
    """The second batch is scored under a copy of each rank's share of the weights before."""
    model = saved_models("llada")
    place = {"samples": 2, "revision": load_policy(model, "cpu").revision}
    given = write(tmp_path / "all.jsonl", [{**row, "rollout": place} for row in verified(3)])
    line = f"update --algo espo --inner 2 -k 2 --clip 0.001 --prompts-per-step 2 -m {model} {STEPS}"
    line = f"{line} {adapter}"
    alone = invoke(*line.split(), "-o", tmp_path / "one", given)
    assert alone.exit_code == 0, alone.output
    made = Ranks(f"{line} -o two", tmp_path, given).done()
    expected = read_jsonl(tmp_path / "one" / "metrics.jsonl")
    assert expected[0]["clipped"] == 0
    assert max(row["clipped"] for row in expected[2:]) > 0
    same_metrics(expected, made)
    same_files(tmp_path / "one" / "latest", tmp_path / "two" / "latest")


def test_a_bad_record_ends_all_ranks_and_the_steps_before_it_are_kept(tmp_path, saved_models):
    given = write(tmp_path / "all.jsonl", [*verified(2), {"id": "x", "reward": "much"}])
    ranks = Ranks(f"update -m {saved_models('llada')} {COMMON} -o run", tmp_path, given)
    assert ranks.commands[0].wait() == 65
    ranks.commands[1].send_signal(signal.SIGTERM)  # as torchrun does
    ranks.commands[1].wait()
    assert "reward" in ranks.err[0].read_text()
    assert os.readlink(tmp_path / "run" / "latest") == "step-000002"
    assert not ranks.err[1].read_text()


def test_a_reader_that_goes_away_ends_all_ranks_with_a_checkpoint(tmp_path, saved_models):
    given = write(tmp_path / "all.jsonl", verified(6))
    reader, writer = os.pipe()
    os.close(reader)
    line = f"update -m {saved_models('llada')} {COMMON} -o run {given}"
    ranks = Ranks(line, tmp_path, given, output=writer)
    os.close(writer)
    assert [command.wait() for command in ranks.commands] == [0, 0]
    assert os.readlink(tmp_path / "run" / "latest") == "step-000001"


@pytest.mark.parametrize("pairs", [1, 2, 5, 12, 13])
def test_every_pair_is_in_one_share_and_all_ranks_take_as_many(monkeypatch, pairs):
    scored = torch.ones(3, dtype=torch.bool)
    masks = MaskSet(scored[None], torch.ones(1, dtype=torch.float64), scored)
    examples = [Example([1] * (7 * n % 5), [2, 3, 4], masks) for n in range(pairs)]
    wanted = torch.ones(pairs, 1).bool()
    monkeypatch.setattr(elbo, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(elbo, "rank", lambda rank=rank: rank)
        shares.append(list(own_micro_batches(examples, wanted, 2)))
    assert len({len(share) for share in shares}) == 1
    taken = [pair for share in shares for batch, counts in share if counts for pair in batch]
    assert sorted(taken) == [(n, 0) for n in range(pairs)]
    assert all(0 < len(batch) <= 2 for share in shares for batch, _ in share)
