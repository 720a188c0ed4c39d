"""Teachers and students of diffusers, compared with what diffusers itself computes."""

import json

import pytest
import torch
from conftest import invoke, read_jsonl
from torch import nn

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import (  # noqa: E402
    SIDE,
    agrees_with,
    ddim,
    distilled,
    from_numpy,
    in_float64,
    pixels,
    points,
    saved,
    tiny_unet,
)

from dlmctl.distill.diffusers_networks import log_levels, timestep_at  # noqa: E402
from dlmctl.distill.edm import solve  # noqa: E402
from dlmctl.distill.image_checkpoints import load_model  # noqa: E402
from dlmctl.distill.image_runs import student_config, student_run  # noqa: E402
from dlmctl.distill.image_sampling import levels  # noqa: E402
from dlmctl.records.errors import UsageError  # noqa: E402
from dlmctl.settings.distill import Distillation  # noqa: E402
from dlmctl.settings.images import NetworkSizes, Training  # noqa: E402

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SCHEDULES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 * n for n in range(1, 101)], "num_train_timesteps": 100},
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("ddim"), ddim())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "scaled", "cosine", "given"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_denoiser_is_what_the_scheduler_predicts_at_its_timesteps(
    prediction, schedule, tmp_path
):
    scheduler = ddim(prediction_type=prediction, **schedule)
    model = in_float64(load_model(saved(tmp_path, scheduler)))
    unet = model.network.unet
    total = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(total)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for t in (0, 1, total // 3, total - 1):
        x_t, sigma = points(model), sigmas[t]
        predicted = scheduler.step(unet(x_t, torch.tensor(t)).sample, t, x_t).pred_original_sample
        x = x_t / scheduler.alphas_cumprod[t].sqrt()
        found = model.function(x, sigma.expand(len(x)))
        torch.testing.assert_close(found, predicted, rtol=1e-5, atol=1e-5)
    assert model.noise.sigma_min == pytest.approx(float(sigmas[0]), rel=1e-12)
    assert model.noise.sigma_max == pytest.approx(float(sigmas[-1]), rel=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_network_is_that_of_edm_with_a_sigma_data_of_one(prediction, tmp_path):
    """F, on which students in continuous time are trained."""
    model = in_float64(load_model(saved(tmp_path, ddim(prediction_type=prediction))))
    x, sigma = points(model, 4), torch.tensor([0.011, 0.3, 2.0, 150.0], dtype=torch.float64)
    wide = sigma[:, None, None, None]
    output = model.network(x / (wide**2 + 1).sqrt(), sigma.log() / 4)
    expected = x / (wide**2 + 1) + wide / (wide**2 + 1).sqrt() * output
    torch.testing.assert_close(model.function(x, sigma), expected, rtol=1e-7, atol=1e-7)


def test_between_timesteps_the_time_is_linear_in_ln_sigma(pipeline):
    model = load_model(pipeline)
    euler = diffusers.EulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    table = log_levels(euler.alphas_cumprod)
    sigmas = torch.tensor([0.01001, 0.0377, 0.5, 3.3, 41.0, 157.0], dtype=torch.float64)
    expected = [float(euler._sigma_to_t(s, table.numpy())) for s in sigmas.numpy()]
    found = timestep_at(sigmas.log(), table)
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    whole = timestep_at(table, table)
    torch.testing.assert_close(whole, torch.arange(1000.0, dtype=torch.float64), atol=1e-9, rtol=0)
    assert bool((whole.float() == torch.arange(1000.0)).all())
    x, between = points(model, 1), sigmas[2:3]
    near = [
        model.function(x.float(), between * factor) - model.function(x.float(), between)
        for factor in (1 + 1e-3, 1 + 1e-2)
    ]
    assert near[0].abs().max() < 0.2 * near[1].abs().max()


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_schedulers_of_the_same_process_are_the_same_teacher(name, pipeline, tmp_path):
    about = diffusers.DDIMScheduler.load_config(pipeline, subfolder="scheduler")
    other = load_model(saved(tmp_path, getattr(diffusers, name).from_config(about)))
    model, sigma = load_model(pipeline), torch.tensor([0.4], dtype=torch.float64)
    x = points(model, 1).float()
    assert torch.equal(other.function(x, sigma), model.function(x, sigma))
    assert other.noise == model.noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_euler_is_ddim_of_eta_0(prediction, clip, tmp_path):
    scheduler = ddim(prediction_type=prediction, clip_sample=clip, clip_sample_range=0.8)
    directory = saved(tmp_path, scheduler)
    pipe = diffusers.DDIMPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        2,
        torch.Generator().manual_seed(5),
        num_inference_steps=20,
        use_clipped_model_output=True,
        output_type="np",
    )
    model = load_model(directory)
    sigmas = log_levels(scheduler.alphas_cumprod)[pipe.scheduler.timesteps].exp()
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(5))
    begin = (1 + sigmas[0] ** 2).sqrt().float() * noise
    found = solve(model.function, begin, sigmas, "euler")
    torch.testing.assert_close(pixels(found), from_numpy(expected), rtol=0, atol=1e-4)
    if clip:
        assert found.abs().max() <= 0.8 + 1e-6


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_student_is_sampled_by_diffusers_as_by_dlmctl(prediction, steps, tmp_path):
    teacher = load_model(saved(tmp_path / "t", ddim(prediction_type=prediction)))
    directory = distilled(tmp_path / "s", teacher)
    pipe = diffusers.DiffusionPipeline.from_pretrained(directory)
    assert type(pipe).__name__ == "DDPMPipeline"
    agrees_with(pipe, load_model(directory), steps)
    moved = load_model(directory).network.state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in teacher.network.state_dict().items())


def test_a_student_of_an_odd_schedule_keeps_its_betas(tmp_path):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="sigmoid", num_train_timesteps=90, clip_sample=False
    )
    teacher = load_model(saved(tmp_path / "t", scheduler))
    directory = distilled(tmp_path / "s", teacher)
    model, pipe = load_model(directory), diffusers.DDPMPipeline.from_pretrained(directory)
    assert torch.equal(pipe.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert model.noise == teacher.noise
    agrees_with(pipe, model, 2)
    with pytest.raises(UsageError, match="--steps 91"):
        levels(model, 91)


def test_a_student_is_the_identity_at_the_first_timestep(pipeline, tmp_path):
    model = load_model(distilled(tmp_path, load_model(pipeline)))
    x, least = points(model).float(), model.noise.sigma_min
    sigma = torch.full((3,), least, dtype=torch.float64)
    torch.testing.assert_close(model.function(x, sigma), x / (1 + least**2) ** 0.5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_c_out_is_what_the_output_is_multiplied_by(prediction, tmp_path):
    teacher = load_model(saved(tmp_path / "t", ddim(prediction_type=prediction)))
    model = in_float64(load_model(distilled(tmp_path / "s", teacher)))
    x, sigma = points(model), torch.tensor([0.02, 0.7, 90.0], dtype=torch.float64)
    before = model.function(x, sigma)
    model.network.unet.conv_out.bias += 1
    moved = (model.function(x, sigma) - before).abs().mean((1, 2, 3))
    torch.testing.assert_close(moved, model.function.c_out(sigma))


def test_a_student_in_continuous_time_begins_as_its_teacher(pipeline, tmp_path):
    teacher = load_model(pipeline)
    plan = Distillation("scd", tangent_warmup=1)
    config = student_config(teacher, teacher.shape, plan, NetworkSizes())
    recipe = Training(2, 4, 0.0, warmup=0, checkpoints=1)
    run = student_run(tmp_path, config, plan, teacher, torch.rand(6, *teacher.shape), recipe, {})
    records = list(run.train(1, 1e9))
    assert all(0 < record["loss"] < 10 for record in records)
    model = load_model(str(tmp_path))
    x, sigma = 5 * points(model).float(), torch.tensor([0.05, 0.9, 30.0], dtype=torch.float64)
    torch.testing.assert_close(model.function(x, sigma), teacher.function(x, sigma))
    agrees_with(diffusers.DDPMPipeline.from_pretrained(tmp_path / "latest"), model, 2)


def test_a_run_that_was_killed_goes_on_bit_for_bit(pipeline, tmp_path):
    teacher, data = load_model(pipeline), torch.rand(6, 3, SIDE, SIDE)
    plan = Distillation("cd", scales=8)
    config = student_config(teacher, teacher.shape, plan, NetworkSizes())
    recipe = Training(4, 4, 1e-3, warmup=0, checkpoints=1)
    for name, seen in (("whole", 4), ("cut", 2), ("cut", 4)):
        run = student_run(tmp_path / name, config, plan, teacher, data, recipe, {})
        for record in run.train(1, 0):
            if record["step"] == seen < 4:
                break
    files = [
        {p.relative_to(top): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (tmp_path / "whole/step-000004", tmp_path / "cut/step-000004")
    ]
    assert files[0] == files[1]
    assert student_run(tmp_path / "cut", config, plan, teacher, data, recipe, {}).finished


def test_dropout_is_off_in_training(tmp_path):
    teacher = load_model(saved(tmp_path, ddim(), tiny_unet(dropout=0.5)))
    network = teacher.network.train()
    x, c = points(teacher).float(), torch.zeros(3)
    assert torch.equal(network(x, c), network(x, c))
    assert any(isinstance(module, nn.Dropout) for module in network.modules())


def test_samples_go_on_to_memo_eval(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "sample PIPE -n 6 --steps 4 -o samples.safetensors --json --device cpu"
    done = invoke("distill", *line.replace("PIPE", pipeline).split())
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["kind"], row["evaluations"], row["step"]) == ("edm", 7, None)
    line = "cd samples.safetensors --teacher PIPE -o student --steps 1 -b 4 --device cpu"
    done = invoke("distill", *line.replace("PIPE", pipeline).split())
    assert done.exit_code == 0, done.stderr
    assert len(read_jsonl(tmp_path / "student/metrics.jsonl")) == 1
    done = invoke(
        "distill", *["sample", "student", "-n", "9", "--device", "cpu", "-o", "ours.safetensors"]
    )
    assert done.exit_code == 0, done.stderr
    line = "--samples ours.safetensors --train samples.safetensors#0:3 --no-quality --device cpu"
    line += " --heldout samples.safetensors#3:6"
    done = invoke("memo-eval", *line.split())
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["model"], row["step"], row["samples"], row["train"]) == ("student", 1, 9, 3)
    card = (tmp_path / "student/latest/README.md").read_text()
    assert 'library_name: "diffusers"' in card
    assert "pipeline(num_inference_steps=1)" in card
