"""Runs: they go on bit for bit, average their weights, and learn what is known in closed form."""

import copy
import shutil

import pytest
import torch
from conftest import read_jsonl
from safetensors.torch import load_file, save_file

from dlmctl.distill.image_checkpoints import ModelConfig, load_model, save_model
from dlmctl.distill.image_networks import NetworkConfig
from dlmctl.distill.image_runs import new_network, student_run, teacher_run
from dlmctl.distill.image_sampling import draw, levels, sample_noise
from dlmctl.records.errors import (
    CannotCreateError,
    DataError,
    MissingInputError,
    UsageError,
)
from dlmctl.settings.distill import Distillation
from dlmctl.settings.images import NoiseLaw, NoiseRange, Training
from dlmctl.train.averages import move_average

SIZES = NetworkConfig("mlp", (2,), 24, (), 2)
CONFIG = ModelConfig("edm", SIZES)
STUDENT = ModelConfig("consistency", SIZES)
DATA = torch.tensor([[0.5, 0.5], [-0.5, 0.25], [0.1, -0.6]])


def recipe(**changes):
    settings = {"steps": 12, "batch_size": 8, "rate": 1e-3, "checkpoints": 3, "first": 3}
    settings |= {"warmup": 0}
    return Training(**{**settings, **changes})


def train(run, records=None, log_every=2, save_seconds=1e9):
    """All records, or so many before the process is killed."""
    made = []
    for record in run.train(log_every, save_seconds):
        made.append(record)
        if len(made) == records:
            break
    return made


def begin(kind, directory, teacher=None, **changes):
    if kind == "edm":
        return teacher_run(directory, CONFIG, NoiseLaw(), DATA, recipe(**changes), {})
    options = {"stage_steps": 5} if kind == "ect" else {"scales": 6, "target_ema": 0.9}
    plan = Distillation(kind, init="teacher" if kind == "cd" else "scratch", **options)
    return student_run(directory, STUDENT, plan, teacher, DATA, recipe(**changes), {})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    train(begin("edm", directory))
    return load_model(str(directory))


def contents(directory):
    """Everything that must be the same, without the times."""
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("metrics.jsonl", ".lock")
    }
    records = read_jsonl(directory / "metrics.jsonl")
    return files, [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize("kind", ["edm", "cd", "ct", "ect"])
@pytest.mark.parametrize("records", [2, 3, 5])
def test_a_run_that_was_killed_goes_on_bit_for_bit(kind, records, teacher, tmp_path):
    train(begin(kind, tmp_path / "whole", teacher))
    assert train(begin(kind, tmp_path / "cut", teacher), records)
    assert (tmp_path / "cut" / "state").exists()
    train(begin(kind, tmp_path / "cut", teacher))
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert whole[0].keys() == cut[0].keys()
    assert whole == cut
    assert {name.split("/")[0] for name in whole[0]} == {
        "step-000003",
        "step-000006",
        "step-000012",
    }


def test_it_goes_on_in_the_middle_of_a_record_too(tmp_path):
    train(begin("edm", tmp_path / "whole"), log_every=5)
    cut = begin("edm", tmp_path / "cut")
    train(cut, 1, log_every=5, save_seconds=0)
    # Saved at step 4 for the last time, with the loss of four of five steps.
    assert cut.step == 5
    train(begin("edm", tmp_path / "cut"), log_every=5)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_run_that_died_at_its_first_checkpoint_goes_on_too(tmp_path, monkeypatch):
    train(begin("edm", tmp_path / "whole"))
    cut = begin("edm", tmp_path / "cut")
    save = cut._save_state

    def die() -> None:
        if cut.step:
            raise KeyboardInterrupt
        save()

    monkeypatch.setattr(cut, "_save_state", die)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    assert (tmp_path / "cut" / "step-000003").exists()
    train(begin("edm", tmp_path / "cut"))
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_the_seed_alone_makes_the_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name) + seed + ord(name))
        train(begin("edm", tmp_path / name, seed=seed))
    states = [load_file(tmp_path / n / "latest" / "model.safetensors") for n in "abc"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_checkpoints_are_spaced_by_a_factor():
    assert Training(12_800, first=100, checkpoints=8).checkpoint_steps() == [
        100 * 2**n for n in range(8)
    ]
    assert recipe(steps=5, first=100).checkpoint_steps() == [5]
    assert recipe(steps=4, first=3, checkpoints=20).checkpoint_steps() == [3, 4]
    assert recipe(steps=9, checkpoints=1).checkpoint_steps() == [9]


def test_a_finished_run_is_left_alone_and_another_is_refused(tmp_path):
    train(begin("edm", tmp_path))
    before = contents(tmp_path)
    again = begin("edm", tmp_path)
    assert again.finished
    assert train(again) == []
    assert contents(tmp_path) == before
    with pytest.raises(UsageError, match="another rate"):
        begin("edm", tmp_path, rate=2e-3)
    with pytest.raises(CannotCreateError, match="another run"):
        begin("edm", tmp_path, steps=20)


def test_a_run_begun_otherwise_is_refused(tmp_path):
    train(begin("edm", tmp_path), 3)
    with pytest.raises(UsageError, match="another seed"):
        begin("edm", tmp_path, seed=5)
    with pytest.raises(UsageError, match="another images_hash"):
        teacher_run(tmp_path, CONFIG, NoiseLaw(), DATA + 1, recipe(), {})


def test_the_target_network_and_the_saved_one_follow_the_student(teacher, tmp_path):
    plan = Distillation("cd", scales=6, target_ema=0.8)
    run = student_run(tmp_path, STUDENT, plan, teacher, DATA, recipe(ema=0.999), {})
    first = copy.deepcopy(run.network)
    path = []
    for _ in range(3):
        run._take_step()
        path.append(copy.deepcopy(run.network))
    for name, decays in (("target", [0.8] * 3), ("ema", [2 / 11, 3 / 12, 4 / 13])):
        expected = copy.deepcopy(first)
        for network, decay in zip(path, decays, strict=True):
            move_average(list(expected.parameters()), list(network.parameters()), decay)
        found = run.averages[name][0]
        for mean, value in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mean, value)


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    sizes = NetworkConfig("unet", (3, 16, 16), 8, (1, 2), 1, (1,), 2)
    config = ModelConfig("consistency", sizes, 0.8, NoiseRange(0.01, 50.0, 5.0))
    network = new_network(config, 0)
    save_model(tmp_path, config, network, {"step": 3})
    found = load_model(str(tmp_path))
    assert found.config == config
    assert found.training == {"step": 3}
    for name, value in network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value)
    assert not any(p.requires_grad for p in found.network.parameters())


def test_loading_is_strict(tmp_path):
    save_model(tmp_path, CONFIG, new_network(CONFIG, 0), {})
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, "more": torch.zeros(1)},
        {**tensors, name: torch.zeros(3)},
    ):
        save_file(wrong, weights)
        with pytest.raises(DataError, match="not the weights"):
            load_model(str(tmp_path))
    weights.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="safetensors"):
        load_model(str(tmp_path))
    for text in ("{}", '{"kind": "edm", "network": 3}', '{"kind": "other", "network": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match="not the configuration"):
            load_model(str(tmp_path))
    shutil.rmtree(tmp_path)
    with pytest.raises(MissingInputError, match="has no model"):
        load_model(str(tmp_path))


def test_a_teacher_and_its_student_learn_the_three_points_there_are(tmp_path):
    """The teacher's samples are the points; the student's, from the same noise, the same ones."""
    sizes = NetworkConfig("mlp", (2,), 32, (), 1)
    shared = {"warmup": 0, "schedule": "cosine", "ema": 0.99, "checkpoints": 1}
    settings = Training(250, 64, 1e-2, **shared)
    config = ModelConfig("edm", sizes)
    train(teacher_run(tmp_path / "t", config, NoiseLaw(), DATA, settings, {}), log_every=100)
    made = load_model(str(tmp_path / "t"))
    plan = Distillation("cd", scales=12, target_ema=0.5)
    settings = Training(150, 64, 5e-3, **shared)
    student = ModelConfig("consistency", sizes)
    run = student_run(tmp_path / "s", student, plan, made, DATA, settings, {})
    train(run, log_every=100)
    ends = draw(made, 200, 0, levels(made, 18))
    nearest = torch.cdist(ends, DATA)
    assert nearest.min(1).values.median() < 0.05
    assert nearest.argmin(1).unique().numel() == 3
    learned = load_model(str(tmp_path / "s"))
    one = draw(learned, 200, 0, levels(learned, 1))
    same = torch.cdist(one, DATA).argmin(1) == nearest.argmin(1)
    assert same.double().mean() > 0.85
    other = draw(learned, 200, 1, levels(learned, 1))
    assert (torch.cdist(other, DATA).argmin(1) == nearest.argmin(1)).double().mean() < 0.6


def test_noise_is_normal_and_a_function_of_seed_sample_and_step():
    z = sample_noise(0, range(2000), (3, 4))
    assert z.mean().abs() < 0.02
    assert z.var().item() == pytest.approx(1, abs=0.03)
    assert z.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(sample_noise(0, range(7, 9), (3, 4)), z[7:9])
    for seed, step in ((1, 0), (0, 1)):
        other = sample_noise(seed, range(2000), (3, 4), step)
        assert torch.stack([z.flatten(), other.flatten()]).corrcoef()[0, 1].abs() < 0.03


def test_a_checkpoint_has_a_card(tmp_path):
    from huggingface_hub import ModelCard

    train(begin("edm", tmp_path / "run", seed=3))
    card = ModelCard.load(tmp_path / "run/latest/README.md")
    last = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert card.data.library_name == "dlmctl"
    assert f"| steps so far | {last['step']} |" in card.text
    assert f"| grad_norm | {last['grad_norm']:.6g} |" in card.text
    assert "| seed | 3 |" in card.text
    assert "images_hash" in card.text
