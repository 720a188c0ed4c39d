"""Ranks under torchrun: the steps, and the files, are those of one process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from pathlib import Path

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl
from preload import parent
from preloaded import Command
from safetensors.torch import load_file

from dlmctl.diffusion import elbo
from dlmctl.diffusion.elbo import Example, own_micro_batches
from dlmctl.diffusion.masks import MaskSet

STEPS = "--batch-size 3 --lr 1e-3 --warmup 3 --grad-norm 0.5 -q"
COMMON = f"--prompts-per-step 2 {STEPS}"
NUMBER = re.compile(r"-?\d[\d.]*(e[-+]?\d+)?")


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


def write(path: Path, records: list[dict]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


class Ranks:
    """`dlmctl` in several processes, started as torchrun does."""

    def __init__(
        self, line: str, cwd: Path, given: Path, count: int = 2, output: int | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.out = [cwd / f"out-{rank}" for rank in range(count)]
        self.err = [cwd / f"err-{rank}" for rank in range(count)]
        self.commands = []
        for rank in range(count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "CUDA_VISIBLE_DEVICES": "",
            }
            with (
                given.open("rb") as records,
                self.out[rank].open("wb") as out,
                self.err[rank].open("wb") as err,
            ):
                to = out.fileno() if output is None or rank else output
                files = [records.fileno(), to, err.fileno()]
                self.commands.append(Command(parent(), line.split(), files, cwd, environment))

    def done(self) -> list[dict]:
        """The metrics, when all have ended well."""
        codes = [command.wait(120) for command in self.commands]
        assert codes == [0] * len(codes), "".join(err.read_text() for err in self.err)
        assert all(not out.read_bytes() for out in self.out[1:])
        return read_jsonl(self.out[0])


def same_metrics(one: list[dict], other: list[dict]) -> None:
    timing = {"run", "seconds", "tokens_per_second", "peak_memory_mb"}
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - timing:
            expected = a[key]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert b[key] == expected, key


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype
                # Attention does not depend on the bias of keys: its gradient is rounding, which
                # Adam blows up to steps of the learning rate.
                atol = 3e-3 if key.endswith("key.bias") else 1e-6
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=atol, msg=key)
        elif name == "adapter_config.json":  # peft writes a set, in the order of its hashes
            a, b = (orjson.loads((run / name).read_bytes()) for run in (one, other))
            assert set(a.pop("target_modules")) == set(b.pop("target_modules"))
            assert a == b
        elif name == "README.md":  # with metrics, which are not the same to the last digit
            a, b = (NUMBER.sub("#", (run / name).read_text()) for run in (one, other))
            assert a == b
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


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
            "update --algo sft --prompts-per-step 1 --masks full -k 1 --gradient-checkpointing",
        ),
        # An adapter; ratios to the old policy and a penalty, in several steps on a batch.
        ("ar", "update --algo grpo --prompts-per-step 2 --beta 0.1 --inner 2 --lora-rank 4"),
        # Two rounds, the target of the second being the student behind the first.
        ("a2d", "distill masked --records-per-step 3 --rounds 2 --steps-per-round 1"),
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


def test_a_bad_record_ends_all_ranks_and_the_steps_before_it_are_kept(tmp_path, saved_models):
    given = write(tmp_path / "all.jsonl", [*verified(2), {"id": "x", "reward": "much"}])
    ranks = Ranks(f"update -m {saved_models('llada')} {COMMON} -o run", tmp_path, given)
    assert ranks.commands[0].wait(120) == 65
    ranks.commands[1].send_signal(signal.SIGTERM)  # as torchrun does
    ranks.commands[1].wait(120)
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
    assert [command.wait(120) for command in ranks.commands] == [0, 0]
    assert os.readlink(tmp_path / "run" / "latest") == "step-000001"


@pytest.mark.parametrize("pairs", [1, 2, 5, 12, 13])
def test_every_pair_is_in_one_share_and_all_ranks_take_as_many(monkeypatch, pairs):
    scored = torch.ones(3, dtype=torch.bool)
    masks = MaskSet(scored[None], torch.ones(1, dtype=torch.float64), scored)
    examples = [Example([1] * (7 * n % 5), [2, 3, 4], masks) for n in range(pairs)]
    wanted = torch.ones(pairs, 1).bool()
    monkeypatch.setattr(elbo, "size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(elbo, "rank", lambda rank=rank: rank)
        shares.append(list(own_micro_batches(examples, wanted, 2)))
    assert len({len(share) for share in shares}) == 1
    taken = [pair for share in shares for batch, counts in share if counts for pair in batch]
    assert sorted(taken) == [(n, 0) for n in range(pairs)]
    assert all(0 < len(batch) <= 2 for share in shares for batch, _ in share)
