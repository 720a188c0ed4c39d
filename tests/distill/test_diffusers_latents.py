"""Models of latents, and of EDM's and consistency models' schedulers, compared with diffusers."""

import json

import pytest
import torch
from conftest import invoke

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import (  # noqa: E402
    SIDE,
    ddim,
    distilled,
    from_numpy,
    pixels,
    points,
    saved,
    tiny_unet,
    tiny_vae,
)

from dlmctl.distill.edm import noise_grid, solve  # noqa: E402
from dlmctl.distill.image_checkpoints import load_model  # noqa: E402
from dlmctl.distill.image_runs import training_data  # noqa: E402
from dlmctl.distill.image_sampling import draw, levels, sample_noise  # noqa: E402
from dlmctl.distill.image_sets import read_images, write_images  # noqa: E402
from dlmctl.records.errors import UsageError  # noqa: E402

LEVELS = torch.tensor([0.01, 0.5, 60.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    place = tmp_path_factory.mktemp("latent")
    return saved(place, ddim(), tiny_unet(4), vqvae=tiny_vae())


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_latents_are_decoded_as_the_pipeline_decodes_them(latent, monkeypatch):
    model = load_model(latent)
    assert model.shape == (4, SIDE, SIDE)
    pipe = diffusers.LDMPipeline.from_pretrained(latent)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(2, torch.Generator().manual_seed(4), num_inference_steps=10, output_type="np")
    noise = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr("dlmctl.distill.image_sampling.sample_noise", lambda *_: noise)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    samples = draw(model, 2, 0, ((1 - kept) / kept).sqrt(), "euler")
    torch.testing.assert_close(pixels(samples), from_numpy(found), rtol=0, atol=1e-4)


def test_images_are_encoded_to_the_mean_of_their_latents(latent, images):
    model = load_model(latent)
    latents = training_data(model, images)
    with torch.no_grad():
        expected = 0.3 * tiny_vae().encode(images).latent_dist.mean
    torch.testing.assert_close(latents, expected)
    assert training_data(model, latents) is latents
    with pytest.raises(UsageError, match="3x32x32 have latents of 4x16x16, and"):
        training_data(model, torch.zeros(2, 3, 32, 32))
    with pytest.raises(UsageError, match="takes images of 3 channels, not 1x16x16"):
        training_data(model, torch.zeros(2, 1, 16, 16))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_a_student_of_latents_is_a_pipeline_with_their_vae(kind, images, tmp_path):
    vae = tiny_vae()
    if kind == "VQModel":
        torch.manual_seed(1)
        vae = diffusers.VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            num_vq_embeddings=16,
        ).eval()
    teacher = load_model(saved(tmp_path / "t", ddim(), tiny_unet(4), vqvae=vae))
    directory = distilled(tmp_path / "s", teacher, training_data(teacher, images))
    pipe = diffusers.DiffusionPipeline.from_pretrained(directory)
    assert (type(pipe).__name__, type(pipe.vqvae).__name__) == ("LDMPipeline", kind)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(2, torch.Generator().manual_seed(4), num_inference_steps=1, output_type="np")
    noise = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    model = load_model(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlmctl.distill.image_sampling.sample_noise", lambda *_: noise)
        samples = draw(model, 2, 0, levels(model, 1))
    torch.testing.assert_close(pixels(samples), from_numpy(expected), rtol=0, atol=1e-4)


def test_the_commands_take_pixels_and_write_pixels(latent, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "set.safetensors", images)
    line = f"cd set.safetensors --teacher {latent} -o student --steps 1 -b 4 --device cpu"
    done = invoke("distill", *line.split())
    assert done.exit_code == 0, done.stderr
    for model in (latent, "student"):
        line = f"sample {model} -n 3 --steps 2 -o out.safetensors --device cpu"
        done = invoke("distill", *line.split())
        assert done.exit_code == 0, done.stderr
        assert read_images("out.safetensors").shape == (3, 3, 16, 16)
    done = invoke(
        "distill",
        *f"cd set.safetensors --teacher {latent} -o new --init scratch".split(),
        *["--objective", "ect", "--network", "unet", "--steps", "1", "--device", "cpu"],
    )
    assert done.exit_code == 2
    assert "give no sizes" in done.stderr


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def edm(request, tmp_path_factory):
    scheduler = diffusers.EDMEulerScheduler(
        sigma_max=60.0, sigma_data=0.6, rho=5.0, prediction_type=request.param
    )
    return saved(tmp_path_factory.mktemp("edm"), scheduler)


def test_an_edm_teacher_has_the_preconditioning_of_its_scheduler(edm):
    model = load_model(edm)
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(edm, subfolder="scheduler")
    unet = diffusers.UNet2DModel.from_pretrained(edm, subfolder="unet")
    assert (model.noise.sigma_max, model.noise.rho, model.config.sigma_data) == (60.0, 5.0, 0.6)
    noise = sample_noise(0, range(2), model.shape)
    scheduler.set_timesteps(12)
    x = 60.0 * noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t).sample
            step = scheduler.step(output, t, x)
            sigma = scheduler.sigmas[scheduler.step_index - 1].double()
            found = model.function(x, sigma.expand(2))
            torch.testing.assert_close(found, step.pred_original_sample, rtol=1e-5, atol=1e-5)
            x = step.prev_sample
    found = solve(model.function, 60.0 * noise, noise_grid(model.noise, 12), "euler")
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [{}, {"objective": "scd"}, {"sigma_max": 20.0}])
def test_a_student_of_edm_is_a_unet_and_its_record(edm, plan, tmp_path):
    """As docs/distill.md says to evaluate it."""
    directory = distilled(tmp_path, load_model(edm), **plan)
    unet = diffusers.UNet2DModel.from_pretrained(directory, subfolder="unet")
    about = json.loads((tmp_path / "latest/dlmctl.json").read_text())
    sd, eps = about["sigma_data"], about["identity_at"]
    eps = about["noise"]["sigma_min"] if eps is None else eps
    sign = -1 if about["network"]["scheduler"]["prediction_type"] == "v_prediction" else 1
    model = load_model(directory)
    assert model.kind == "consistency"
    assert model.noise.sigma_max == about["noise"]["sigma_max"] == plan.get("sigma_max", 60.0)
    assert eps == (0 if plan.get("objective") else 0.002)
    x = points(model).float()
    for sigma in LEVELS.tolist():
        root = (sigma**2 + sd**2) ** 0.5
        with torch.no_grad():
            output = unet(x / root, torch.tensor(sigma).log() / 4).sample
        expected = sd**2 / ((sigma - eps) ** 2 + sd**2) * x
        expected = expected + sign * (sigma - eps) * sd / root * output
        found = model.function(x, torch.full((3,), sigma, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("clip", [True, False])
def test_consistency_models_of_diffusers_are_sampled_alike(clip, steps, tmp_path):
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=clip)
    pipe = diffusers.ConsistencyModelPipeline(unet=tiny_unet(), scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    model = load_model(str(tmp_path))
    assert model.kind == "consistency"
    random = torch.Generator().manual_seed(6)
    drawn = [torch.randn(2, *model.shape, generator=random) for _ in range(steps)]
    random = torch.Generator().manual_seed(6)
    torch.randn(drawn[0].shape, generator=random)
    expected = pipe(
        2, num_inference_steps=steps, latents=drawn[0], generator=random, output_type="pt"
    ).images
    with pytest.MonkeyPatch.context() as patch:
        name = "dlmctl.distill.image_sampling.sample_noise"
        patch.setattr(name, lambda seed, samples, shape, step=0: drawn[step])
        found = draw(model, 2, 0, levels(model, steps))
    torch.testing.assert_close(pixels(found), expected, rtol=0, atol=1e-5)
