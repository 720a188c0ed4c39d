"""Latent consistency models of texts, compared with diffusers' pipelines and schedulers."""

import json
import shutil

import pytest
import torch
from conftest import invoke
from PIL import Image
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import (  # noqa: E402
    SIDE,
    ddim,
    from_numpy,
    pixels,
    save_text_pipeline,
)

from dlmctl.distill.guided_consistency import guided_loss, strength_embedding  # noqa: E402
from dlmctl.distill.image_checkpoints import load_model, load_text_model  # noqa: E402
from dlmctl.distill.image_sampling import draw, levels  # noqa: E402
from dlmctl.distill.text_pipelines import load_text_pipeline, student_unet  # noqa: E402
from dlmctl.distill.text_runs import guided_run, read_texts  # noqa: E402
from dlmctl.records.errors import DataError, MissingInputError, UsageError  # noqa: E402
from dlmctl.settings.distill import GuidedDistillation  # noqa: E402
from dlmctl.settings.images import Training  # noqa: E402

TEXTS = ["a bed", "bad", "a cab"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_text_pipeline(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def teacher(pipeline):
    return load_text_pipeline(pipeline, CPU)


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """Trained for two steps on three images."""
    plan = GuidedDistillation(ddim_steps=20, strength_size=16)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    recipe = Training(2, 4, 1e-3, warmup=0, checkpoints=1, ema=0.0)
    place = tmp_path_factory.mktemp("run")
    run = guided_run(place, teacher, plan, images, TEXTS, recipe, {"images": "three"})
    assert all(0 < record["loss"] < 10 for record in run.train(1, 1e9))
    weights = place / "latest/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    assert tensors["time_embedding.cond_proj.weight"].abs().max() > 0
    # Two steps have not taught it much about the guidance scale.
    random = torch.Generator().manual_seed(7)
    tensors["time_embedding.cond_proj.weight"].normal_(0, 0.3, generator=random)
    save_file(tensors, weights, metadata={"format": "pt"})
    return place


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(seed, count, steps):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 4, SIDE, SIDE, generator=random) for _ in range(steps)]


def ours(monkeypatch, noise, model, *arguments):
    name = "dlmctl.distill.image_sampling.sample_noise"
    monkeypatch.setattr(name, lambda seed, samples, shape, step=0: noise[step])
    return draw(model, len(noise[0]), 0, *arguments)


def test_texts_are_encoded_as_the_pipeline_encodes_them(pipeline, teacher):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    expected, empty = pipe.encode_prompt(TEXTS, "cpu", 1, True)
    torch.testing.assert_close(teacher.encode(TEXTS, batch_size=2), expected)
    torch.testing.assert_close(teacher.process.empty.expand_as(empty), empty)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_a_teacher_is_sampled_with_guidance_as_by_its_pipeline(pipeline, monkeypatch):
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(pipeline))
    noise = drawn(3, 3, 1)
    made = pipe(
        TEXTS, latents=noise[0], guidance_scale=4.0, num_inference_steps=10, output_type="np"
    )
    model = load_text_model(str(pipeline), TEXTS, 4.0)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    samples = ours(monkeypatch, noise, model, ((1 - kept) / kept).sqrt(), "euler")
    torch.testing.assert_close(pixels(samples), from_numpy(made), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_student_is_sampled_by_diffusers_as_by_dlmctl(student, steps, monkeypatch):
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(student / "latest"))
    assert type(pipe).__name__ == "LatentConsistencyModelPipeline"
    noise = drawn(4, 3, steps)
    random = torch.Generator().manual_seed(4)
    torch.randn(noise[0].shape, generator=random)
    made = [
        pipe(TEXTS, latents=noise[0], guidance_scale=scale, num_inference_steps=steps,
             generator=random if scale == 6 else None, output_type="np")
        for scale in (6.0, 2.0)
    ]  # fmt: skip
    model = load_text_model(str(student), TEXTS, 6.0)
    assert model.kind == "consistency"
    samples = ours(monkeypatch, noise, model, levels(model, steps))
    torch.testing.assert_close(pixels(samples), from_numpy(made[0]), rtol=0, atol=1e-5)
    assert abs(made[0].images - made[1].images).max() > 1e-4  # the scale counts


def test_a_student_begins_as_its_teacher_without_guidance(teacher):
    unet, about = student_unet(teacher, 16)
    assert about["time_cond_proj_dim"] == 16
    text, strength = teacher.encode(TEXTS), torch.tensor([1.0, 7.0, 13.0])
    x, sigma = torch.randn(3, 4, SIDE, SIDE), torch.tensor([0.5, 3.0, 90.0], dtype=torch.float64)
    found = teacher.process.student(unet, text, strength, scaling=1e6)(x, sigma)
    expected = teacher.process.denoiser(text, torch.zeros(3))(x, sigma)
    torch.testing.assert_close(found, expected)


def test_the_embedding_of_the_scale_is_that_of_the_pipeline(student):
    pipe = diffusers.DiffusionPipeline.from_pretrained(student / "latest")
    strength = torch.tensor([2.0, 6.5, 14.0])
    for size in (16, 33):
        expected = pipe.get_guidance_scale_embedding(strength, embedding_dim=size)
        assert torch.equal(strength_embedding(strength, size), expected)


@pytest.mark.parametrize("metric", ["l2", "huber"])
def test_the_loss_is_the_published_one_in_its_own_coordinates(teacher, metric):
    """Computed from the schedulers of diffusers, timestep by timestep and row by row."""
    plan = GuidedDistillation(ddim_steps=20, metric=metric, strength_size=16)
    unet, _ = student_unet(teacher, 16)
    target, _ = student_unet(teacher, 16)
    torch.manual_seed(2)
    for network in (unet, target):
        torch.nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.3)
    latents = torch.randn(5, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(8))
    text = teacher.encode([*TEXTS, "ace", "dab"])
    found = guided_loss(
        plan, teacher.process, unet, target, latents, text, torch.Generator().manual_seed(9)
    )
    halves = [
        guided_loss(plan, teacher.process, unet, target, latents, text,
                    torch.Generator().manual_seed(9), own)
        for own in (slice(0, 2), slice(2, 5))
    ]  # fmt: skip
    torch.testing.assert_close(sum(halves), found)

    random = torch.Generator().manual_seed(9)
    index = torch.randint(1, 21, (5,), generator=random)
    strength = 2 + 12 * torch.rand(5, generator=random)
    noise = torch.randn(latents.shape, generator=random)
    scheduler = ddim(prediction_type="v_prediction")
    scheduler.set_timesteps(20)
    process = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    lcm = diffusers.LCMScheduler(
        **process, prediction_type="v_prediction", original_inference_steps=20
    )

    def consistency(network, x, t, row):
        embedded = strength_embedding(strength[row : row + 1], 16)
        output = network(x, t, timestep_cond=embedded, encoder_hidden_states=text[row : row + 1])
        lcm.set_timesteps(timesteps=[int(t)])
        return lcm.step(output.sample, t, x).denoised

    losses = []
    with torch.no_grad():
        for row in range(5):
            start = 50 * index[row] - 1
            x = scheduler.add_noise(latents[row : row + 1], noise[row : row + 1], start[None])
            outputs = [
                teacher.process.unet(x, start, encoder_hidden_states=states).sample
                for states in (text[row : row + 1], teacher.process.empty[None])
            ]
            output = outputs[0] + strength[row] * (outputs[0] - outputs[1])
            ahead = scheduler.step(output, start, x)
            to = start - 50
            if to < 0:  # the published solver ends at the first timestep
                to = torch.tensor(0)
                kept = scheduler.alphas_cumprod
                data = ahead.pred_original_sample
                rest = (x - kept[start].sqrt() * data) / (1 - kept[start]).sqrt()
                ahead.prev_sample = kept[0].sqrt() * data + (1 - kept[0]).sqrt() * rest
            goal = consistency(target, ahead.prev_sample, to, row)
            square = (consistency(unet, x, start, row) - goal) ** 2
            losses.append(square if metric == "l2" else (square + 1e-6).sqrt() - 0.001)
    torch.testing.assert_close(found, torch.cat(losses).mean(), rtol=1e-4, atol=1e-6)


def test_the_first_timestep_of_the_solver_is_drawn_too(teacher, monkeypatch):
    """There the target is the noisy latents themselves."""
    plan = GuidedDistillation(ddim_steps=20, strength_size=16)
    unet, _ = student_unet(teacher, 16)
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size, generator: torch.ones(size).long()
    )
    text, latents = teacher.encode(TEXTS), torch.randn(3, 4, SIDE, SIDE)
    loss = guided_loss(plan, teacher.process, unet, unet, latents, text, torch.Generator())
    assert 0 < loss.item() < 10


def test_the_commands_go_from_records_to_samples(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "data.jsonl").open("w") as file:
        for n, text in enumerate(TEXTS):
            Image.new("RGB", (16, 16), (80 * n, 40, 200)).save(f"{n}.png")
            file.write(json.dumps({"image": f"{n}.png", "text": text}) + "\n")
    line = f"lcm data.jsonl --teacher {pipeline} -o run --steps 2 -b 2 --device cpu"
    done = invoke("distill", *line.split(), "--guidance-size", 16)
    assert done.exit_code == 0, done.stderr
    (tmp_path / "prompts.txt").write_text("bad\n\na cab\n")
    assert read_texts("prompts.txt") == ["bad", "a cab"]
    assert read_texts("data.jsonl") == TEXTS
    for model, options, count in (("run", ["--steps", 2], 2), (pipeline, ["--steps", 3], 10)):
        line = ["sample", model, "-n", 5, "--prompts", "prompts.txt", "-o", "out.safetensors"]
        done = invoke("distill", *line, "--json", "--device", "cpu", *options)
        assert done.exit_code == 0, done.stderr
        row = json.loads(done.stdout)
        assert (row["evaluations"], row["guidance"], row["prompts"]) == (count, 7.5, "prompts.txt")
    line = "--samples out.safetensors --train out.safetensors#0:3 --no-quality --device cpu"
    done = invoke("memo-eval", *line.split())
    assert done.exit_code == 0, done.stderr
    card = (tmp_path / "run/latest/README.md").read_text()
    assert 'pipeline_tag: "text-to-image"' in card


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("model_index.json", {"text_encoder_2": ["a", "b"]}, "with the part text_encoder_2"),
        ("model_index.json", {"text_encoder": ["x", "T5"]}, "the text_encoder is x.T5"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "(addition_embed_type)"),
        ("unet/config.json", {"in_channels": 9}, "9 channels in, 4 out"),
        ("unet/config.json", {"time_cond_proj_dim": 16}, "a teacher neither"),
        ("unet/config.json", {"quantization_config": {}}, "quantized weights"),
        ("unet/config.json", {"sample_size": None}, "no sample_size"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample is for pixels"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "not handled"),
        ("text_encoder/config.json", {"max_position_embeddings": 4}, "text encoder cannot be"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "a stated mean"),
    ],
)
def test_what_is_not_handled_is_named(pipeline, tmp_path, file, changes, complaint):
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    change(copy / file, **changes)
    with pytest.raises(DataError) as raised:
        load_text_pipeline(copy, CPU)
    assert complaint in str(raised.value)


def test_what_does_not_fit_is_refused(pipeline, teacher, student, tmp_path):
    plan, recipe = GuidedDistillation(ddim_steps=20), Training(2, 4, checkpoints=1)
    arguments = (torch.zeros(3, 3, 32, 32), TEXTS, recipe, {})
    with pytest.raises(UsageError, match="3x32x32 have latents of 4x16x16"):
        guided_run(tmp_path, teacher, plan, *arguments)
    with pytest.raises(UsageError, match="--ddim-steps 30 does not divide the 1000"):
        guided_run(tmp_path, teacher, GuidedDistillation(ddim_steps=30), *arguments)
    with pytest.raises(UsageError, match="is a student itself"):
        guided_run(tmp_path, load_text_pipeline(student / "latest", CPU), plan, *arguments)
    with pytest.raises(UsageError, match="--guidance-min 5 is above"):
        GuidedDistillation(guidance_min=5, guidance_max=4)
    with pytest.raises(DataError, match="'distill sample' needs --prompts"):
        load_model(str(pipeline))
    with pytest.raises(UsageError, match="has no text encoder"):
        load_text_model(str(pipeline / "unet"), TEXTS, 7.5)
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    change(copy / "model_index.json", tokenizer=[None, None])
    with pytest.raises(MissingInputError, match="has no part tokenizer"):
        load_text_pipeline(copy, CPU)
