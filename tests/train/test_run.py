"""Runs: they resume where they were, skip what is not finite, and keep their reference."""

import json
import math
import os
import signal
import time

import pytest
import torch
from conftest import read_jsonl
from preload import parent
from preloaded import Command
from safetensors.torch import load_file, save_file
from small_runs import BATCHING, OBJECTIVE, same, train, verified, weights

from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, dump
from dlmctl.rl.policy_gradient import Batching
from dlmctl.rl.samplers import reference_log_probs
from dlmctl.rl.update import update_policy, update_supervised
from dlmctl.settings.masks import Fill
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.run import open_run, restore_random
from dlmctl.train.run_directory import latest_checkpoint, read_progress

SECOND = torch.device("cuda:1")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_in_two_parts_ends_where_one_in_one_part_does(tmp_path, saved_models, rank):
    model = saved_models("llada")
    settings = {"warmup": 3, "schedule": "cosine", "total_steps": 4}
    whole, _ = train(tmp_path / "whole", model, verified(4), rank, **settings)
    first, _ = train(tmp_path / "parts", model, verified(2), rank, **settings)
    second, _ = train(tmp_path / "parts", None, verified(2, first=2), rank, **settings)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [m["step"] for m in first + second] == [1, 2, 3, 4]
    for a, b in zip(whole, first + second, strict=True):
        assert a["lr"] == b["lr"]
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-9)
    assert second[0]["kl"] != 0
    logged = read_jsonl(tmp_path / "parts" / "metrics.jsonl")
    assert [m["step"] for m in logged] == [1, 2, 3, 4]


def test_a_batch_that_failed_is_not_among_what_was_trained_on(tmp_path, saved_models):
    def broken():
        yield from verified(1)
        yield from ({**record, "tokens": {"completion": "?"}} for record in verified(1, first=1))

    run = open_run(
        tmp_path / "run", saved_models("llada"), "rspo", Optimizer(1e-2), Adapter(), "cpu",
        "auto", False, seed=0,
    )  # fmt: skip
    with pytest.raises(DataError):
        list(update_policy(broken(), run, OBJECTIVE, BATCHING, 2, 8, save_every=100, keep=2))
    progress = read_progress(latest_checkpoint(tmp_path / "run"))
    assert (progress.step, progress.completions) == (1, 4)


def test_a_batch_that_was_cut_between_its_steps_is_taken_again(tmp_path, saved_models):
    batching = Batching(MaskPlan(samples=2), inner=2)

    def part(name, records, steps=None, save_every=1):
        run = open_run(
            tmp_path / name, saved_models("llada"), "rspo", Optimizer(1e-2), Adapter(), "cpu",
            "auto", False, seed=0,
        )  # fmt: skip
        rest = run.untrained(iter(records))
        metrics = update_policy(rest, run, OBJECTIVE, batching, 2, 8, save_every, keep=2)
        for _ in range(steps or 100):
            next(metrics, None)
        metrics.close()
        return read_progress(latest_checkpoint(tmp_path / name))

    whole = part("whole", verified(2))
    cut = part("parts", verified(2), steps=3)
    assert (cut.step, cut.completions) == (2, 4)
    assert part("parts", verified(2)) == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    # Cut behind the last step of a batch, it is saved.
    assert part("two", verified(2), steps=2, save_every=100).completions == 4


def test_dropout_of_an_adapter_resumes_with_the_random_state(tmp_path, saved_models):
    def part(name, records):
        run = open_run(
            tmp_path / name,
            saved_models("llada"),
            "rspo",
            Optimizer(1e-2),
            Adapter(4, dropout=0.3),
            "cpu",
            "auto",
            False,
            seed=0,
        )
        list(update_policy(records, run, OBJECTIVE, BATCHING, 2, 8, 100, 2))

    part("whole", verified(4))
    part("parts", verified(2))
    part("parts", verified(2, first=2))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_random_state_of_a_gpu_goes_to_the_one_that_trains(tmp_path, saved_models, monkeypatch):
    train(tmp_path / "run", saved_models("llada"), verified(1))
    path = latest_checkpoint(tmp_path / "run") / "training.safetensors"
    state = torch.arange(16, dtype=torch.uint8)
    save_file({**load_file(path), "random.cuda": state}, path)
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: restored.append(given))
    train(tmp_path / "run", saved_models("llada"), verified(1, first=1))
    assert restored == []
    restore_random({"random.cpu": torch.get_rng_state(), "random.cuda": state}, SECOND)
    assert restored == [(state, SECOND)]


def test_an_adapter_begins_as_the_base_model_and_the_base_stays_the_reference(
    tmp_path, saved_models
):
    model = saved_models("llada")
    metrics, run = train(tmp_path / "run", model, verified(3), rank=4)
    assert metrics[0]["kl"] == 0.0
    assert metrics[2]["kl"] != 0.0
    base = load_policy(model, "cpu")
    records = list(verified(1))
    examples = [example_of(r, base, BATCHING.plan) for r in records]
    from dlmctl.diffusion.elbo import log_probs

    reference = reference_log_probs(run, examples, 4)
    expected = log_probs(base, examples, 4)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(reference, expected, strict=True))
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()


def test_a_saved_adapter_scores_as_the_run_that_saved_it(tmp_path, saved_models):
    _, run = train(tmp_path / "run", saved_models("llada"), verified(2), rank=4)
    again = load_policy(str(tmp_path / "run"), "cpu")
    ids = torch.tensor([[3, 4, 5, 2, 2]])
    with torch.no_grad():
        assert torch.equal(again.hidden(ids, None), run.policy.hidden(ids, None))


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, saved_models):
    model = saved_models("llada")
    records = list(verified(3))
    for record in records[4:8]:
        record["reward"] = math.inf if record["sample"] else 0.0
        record["advantage"] = math.nan
    for record in records[:4] + records[8:]:
        record["advantage"] = record["reward"] - 0.5
    metrics, run = train(tmp_path / "run", model, records)
    assert [m["applied"] for m in metrics] == [True, False, True]
    assert [m["skipped"] for m in metrics] == [0, 1, 1]
    assert all(p.isfinite().all() for p in run.policy.model.parameters())
    assert read_progress(latest_checkpoint(tmp_path / "run")).skipped == 1


def test_only_the_newest_checkpoints_stay_and_each_is_whole(tmp_path, saved_models):
    run = open_run(
        tmp_path / "run",
        saved_models("llada"),
        "rspo",
        Optimizer(1e-3),
        Adapter(),
        "cpu",
        "auto",
        False,
        seed=0,
    )
    list(update_policy(verified(5), run, OBJECTIVE, BATCHING, 2, 8, save_every=1, keep=2))
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [".lock", "latest", "metrics.jsonl", "step-000004", "step-000005"]
    assert os.readlink(tmp_path / "run" / "latest") == "step-000005"
    load_policy(str(tmp_path / "run" / "step-000004"), "cpu")


def test_what_was_learnt_before_a_bad_record_is_kept(tmp_path, saved_models):
    def stream():
        yield from verified(2)
        bad = Record(id="x", reward="much")
        bad.where = "x.jsonl:9"
        yield bad

    from dlmctl.records.errors import DataError

    with pytest.raises(DataError):
        train(tmp_path / "run", saved_models("llada"), stream())
    assert read_progress(latest_checkpoint(tmp_path / "run")).step == 2


def test_a_directory_of_another_algorithm_is_refused(tmp_path, saved_models):
    train(tmp_path / "run", saved_models("llada"), verified(1))
    with pytest.raises(UsageError, match="--algo rspo, not sft"):
        open_run(tmp_path / "run", "x", "sft", Optimizer(), Adapter(), "cpu", "auto", False, 0)


@pytest.mark.parametrize("rank", [0, 4])
def test_training_in_float16_is_refused_and_leaves_no_run(tmp_path, saved_models, rank):
    settings = (Optimizer(), Adapter(rank), "cpu", "float16", False, 0)
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        open_run(tmp_path / "run", saved_models("llada"), "rspo", *settings)
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, saved_models):
    results = []
    for checkpointing in (False, True):
        run = open_run(
            tmp_path / str(checkpointing),
            saved_models("llada"),
            "rspo",
            Optimizer(1e-2),
            Adapter(),
            "cpu",
            "auto",
            checkpointing,
            seed=0,
        )
        list(update_policy(verified(2), run, OBJECTIVE, BATCHING, 2, 8, 100, 2))
        results.append(weights(tmp_path / str(checkpointing)))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-6)


def test_supervised_training_learns_its_completions(tmp_path, saved_models):
    run = open_run(
        tmp_path / "run",
        saved_models("llada"),
        "sft",
        Optimizer(1e-2, max_norm=1.0, weight_decay=0.0),
        Adapter(),
        "cpu",
        "auto",
        False,
        seed=0,
    )
    records = [Record(prompt="12=", completion="34") for _ in range(480)]
    metrics = list(
        update_supervised(records, run, MaskPlan(samples=2), 8, 8, Fill(4), save_every=100, keep=1)
    )
    assert len(metrics) == 60
    assert metrics[-1]["loss"] < 0.1 * metrics[0]["loss"]
    assert run.progress.tokens == 480 * 4  # with the end-of-sequence that fills up
    from dlmctl.diffusion.sampler import sample
    from dlmctl.diffusion.sampling import SamplerConfig

    prompt = run.policy.encode({"prompt": "12="})
    [made] = sample(run.policy, [prompt], [0], SamplerConfig(4, 4, 4))
    assert run.policy.decode(made.tokens) == "34"
    assert made.tokens[2:] == [1, 1]


def test_a_completion_longer_than_the_filling_is_refused(tmp_path, saved_models):
    run = open_run(
        tmp_path / "run",
        saved_models("llada"),
        "sft",
        Optimizer(),
        Adapter(),
        "cpu",
        "auto",
        False,
        seed=0,
    )
    with pytest.raises(UsageError, match="5 tokens, --fill-to is 4"):
        list(
            update_supervised(
                [Record(prompt="1", completion="12345")], run, MaskPlan(), 1, 1, Fill(4), 9, 1
            )
        )


def test_killing_a_run_leaves_the_newest_checkpoint_whole(tmp_path, saved_models):
    line = f"update -m {saved_models('llada')} -o run --prompts-per-step 2 --save-every 1"
    source, records = os.pipe()
    reader, writer = os.pipe()
    with open(os.devnull, "r+b") as nothing, open(reader, "rb") as metrics_lines:
        process = Command(parent(), line.split(), [source, writer, nothing.fileno()], tmp_path)
        os.close(source)
        os.close(writer)
        # More steps than are waited for, and no end, so that it is not done before it is killed.
        os.write(records, b"".join(dump(record) for record in verified(50)))
        for _ in range(5):
            assert metrics_lines.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        os.close(records)
    checkpoint = latest_checkpoint(tmp_path / "run")
    step = read_progress(checkpoint).step
    assert step >= 3
    load_policy(str(checkpoint), "cpu")
    metrics, _ = train(tmp_path / "run", None, verified(1, first=step))
    assert metrics[0]["step"] == step + 1


def test_the_revision_of_a_run_is_that_of_the_checkpoint_it_published(tmp_path, saved_models):
    for rank in (0, 4):
        _, run = train(tmp_path / f"run-{rank}", saved_models("llada"), verified(1), rank=rank)
        there = load_policy(str(tmp_path / f"run-{rank}"), "cpu").revision
        assert run.policy.revision == there == run.revisions[-1]


def test_what_a_killed_process_left_behind_its_checkpoint_is_forgotten(tmp_path, saved_models):
    run = tmp_path / "run"
    train(run, saved_models("llada"), verified(2))
    log = run / "metrics.jsonl"
    whole = log.read_bytes()
    step = read_progress(latest_checkpoint(run)).step
    log.write_bytes(whole + b'{"step": %d}\n{"ste' % (step + 1))
    (run / ".step-000099.partial-1").mkdir()
    (run / ".latest.partial-1").symlink_to("nowhere")
    train(run, saved_models("llada"), verified(1))
    assert log.read_bytes().startswith(whole)
    assert [json.loads(line)["step"] for line in log.read_bytes().splitlines()] == list(
        range(1, read_progress(latest_checkpoint(run)).step + 1)
    )
    assert not list(run.glob(".*partial*"))
