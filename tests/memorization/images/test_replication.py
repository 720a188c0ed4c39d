"""Measures of prompts against loops over diffusers' own U-Net, schedulers and CLIP."""

import sys
from pathlib import Path

import orjson
import pytest
import torch
from conftest import invoke

diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[2] / "distill"))

from tiny_pipelines import SIDE, ddim, save_text_pipeline, text_parts  # noqa: E402
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig  # noqa: E402

from dlmctl.distill.image_sampling import sample_noise  # noqa: E402
from dlmctl.distill.text_pipelines import load_text_pipeline  # noqa: E402
from dlmctl.distill.text_runs import guided_run  # noqa: E402
from dlmctl.memorization.images.image_encoder import ClipScorer  # noqa: E402
from dlmctl.memorization.images.near_duplicates import (  # noqa: E402
    largest_clique,
    tile_distances,
)
from dlmctl.memorization.images.replication import (  # noqa: E402
    is_member,
    prompt_scores,
    samples_of,
)
from dlmctl.memorization.text.membership import separation  # noqa: E402
from dlmctl.records.errors import DataError, MissingInputError, UsageError  # noqa: E402
from dlmctl.settings.distill import GuidedDistillation  # noqa: E402
from dlmctl.settings.images import Training  # noqa: E402
from dlmctl.settings.memorization import Bootstrap  # noqa: E402
from dlmctl.settings.replication import Replication  # noqa: E402

CPU = torch.device("cpu")
PROMPT = "a bed"


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipeline(request, tmp_path_factory):
    """With a scheduler as that of Stable Diffusion 1."""
    place = tmp_path_factory.mktemp(request.param)
    about = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return save_text_pipeline(place, prediction_type=request.param, steps_offset=1, **about)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Trained for one step; a directory."""
    teacher = load_text_pipeline(save_text_pipeline(tmp_path_factory.mktemp("teacher")), CPU)
    plan = GuidedDistillation(ddim_steps=20, strength_size=16)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    recipe = Training(1, 2, 1e-3, warmup=0, checkpoints=1, ema=0.0)
    place = tmp_path_factory.mktemp("run")
    run = guided_run(place, teacher, plan, images, ["a bed", "bad"], recipe, {})
    list(run.train(1, 1e9))
    return place


def encoded(pipe, text):
    """States of a text and of the empty text, float [1, L, E] each."""
    return pipe.encode_prompt(text, "cpu", 1, True)


def quiet(kind, place):
    pipe = kind.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(place, steps, count, guidance, seed):
    """Norms [count, steps] and latents, sample by sample and step by step, as Wen et al. do."""
    pipe = quiet(diffusers.StableDiffusionPipeline, place)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    text, empty = encoded(pipe, PROMPT)
    norms, latents = torch.zeros(count, steps), []
    with torch.no_grad():
        for number in range(count):
            pipe.scheduler.set_timesteps(steps)
            x = sample_noise(seed, range(number, number + 1), (4, SIDE, SIDE))
            for step, t in enumerate(pipe.scheduler.timesteps):
                outputs = [pipe.unet(x, t, states).sample for states in (text, empty)]
                kept = pipe.scheduler.alphas_cumprod[t]
                noise = outputs
                if pipe.scheduler.config.prediction_type == "v_prediction":
                    noise = [kept.sqrt() * v + (1 - kept).sqrt() * x for v in outputs]
                norms[number, step] = (noise[0] - noise[1]).norm()
                output = outputs[1] + guidance * (outputs[0] - outputs[1])
                x = pipe.scheduler.step(output, t, x).prev_sample
            latents.append(x)
    return norms, torch.cat(latents), pipe


def test_norms_are_those_of_a_loop_over_the_pipeline(pipeline):
    plan = Replication(measure="norm", count=3, steps=5, guidance=4.0, batch_size=2, seed=3)
    model = load_text_pipeline(pipeline, CPU)
    wanted, _, _ = by_hand(pipeline, 5, 3, 4.0, 3)
    made = samples_of(model, PROMPT, plan)
    assert made.images is None
    torch.testing.assert_close(made.norms.float(), wanted, rtol=2e-4, atol=1e-4)
    assert wanted.std() > 1e-3
    row = prompt_scores(model, PROMPT, plan, None)
    assert row["noise_norm"] == pytest.approx(float(wanted.mean()), rel=2e-4)
    assert row["noise_norm_1"] == pytest.approx(float(wanted[:, 0].mean()), rel=2e-4)
    # Fewer steps of the norm end the sampler early.
    evaluated = []
    hook = model.process.unet.register_forward_pre_hook(lambda *_: evaluated.append(1))
    short = Replication(
        measure="norm", count=3, steps=5, norm_steps=2, guidance=4.0, batch_size=3, seed=3
    )
    row = prompt_scores(model, PROMPT, short, None)
    hook.remove()
    assert len(evaluated) == 4
    assert row["noise_norm"] == pytest.approx(float(wanted[:, :2].mean()), rel=2e-4)
    # Without guidance, and for another text, there are other numbers.
    assert samples_of(model, "cab", plan).norms.sub(made.norms).abs().max() > 1e-3


def test_samples_are_those_of_the_pipeline_and_cliques_are_theirs(pipeline):
    plan = Replication(
        measure="clique", count=6, steps=4, guidance=4.0, clique_size=3, tiles=2, batch_size=4
    )
    model = load_text_pipeline(pipeline, CPU)
    _, latents, pipe = by_hand(pipeline, 4, 6, 4.0, 0)
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255)
    made = samples_of(model, PROMPT, plan)
    assert (made.images.float() - levels).abs().max() <= 1
    distances = tile_distances(made.images, 2)
    limit = float(distances[distances > 0].median())
    chosen = Replication(
        measure="clique", count=6, steps=4, guidance=4.0, clique_size=3, tiles=2,
        tile_distance=limit, batch_size=4,
    )  # fmt: skip
    row = prompt_scores(model, PROMPT, chosen, None)
    clique, _ = largest_clique(distances <= limit)
    assert row["clique_samples"] == clique
    assert (row["clique"], row["clique_exact"]) == (len(clique), True)
    assert 2 <= row["clique"] < 6
    assert row["replicated"] == (len(clique) >= 3)
    assert row["tile_l2"] == pytest.approx(float(distances.sum() / 30))
    everything = Replication(
        measure="clique", count=6, steps=4, guidance=4.0, clique_size=6, tile_distance=1.0
    )
    assert prompt_scores(model, PROMPT, everything, None)["replicated"]


def test_a_student_is_measured_on_its_own_way(student):
    """Against diffusers' LCMScheduler; eps from the network's v, with the guidance embedded."""
    model = load_text_pipeline(student / "latest", CPU)
    plan = Replication(measure="norm,clique", count=3, steps=3, guidance=6.0, clique_size=2, seed=2)
    made = samples_of(model, PROMPT, plan)
    pipe = quiet(diffusers.DiffusionPipeline, student / "latest")
    text, _ = encoded(pipe, PROMPT)
    _, empty = encoded(quiet(diffusers.StableDiffusionPipeline, model_of(student)), PROMPT)
    scheduler = pipe.scheduler
    embedded = pipe.get_guidance_scale_embedding(torch.tensor([5.0] * 3), embedding_dim=16)
    draws = [sample_noise(2, range(3), (4, SIDE, SIDE), step) for step in range(3)]
    scheduler.set_timesteps(3)
    x, norms = draws[0], []
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            outputs = [
                pipe.unet(x, t, each.expand(3, -1, -1), timestep_cond=embedded).sample
                for each in (text, empty)
            ]
            kept = scheduler.alphas_cumprod[t]
            norms.append(kept.sqrt() * (outputs[0] - outputs[1]).flatten(1).norm(dim=1))
            x = scheduler.step(outputs[0], t, x).denoised
            if step < 2:
                kept = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]]
                x = kept.sqrt() * x + (1 - kept).sqrt() * draws[step + 1]
        pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(made.norms.float(), torch.stack(norms, 1), rtol=2e-4, atol=1e-4)
    assert (made.images - ((pixels + 1) * 127.5).clamp(0, 255)).abs().max() <= 1.5
    # Without the norm the network is evaluated once a step.
    evaluated = []
    model.process.unet.register_forward_pre_hook(lambda *_: evaluated.append(1))
    only = Replication(measure="clique", count=3, steps=3, guidance=6.0, clique_size=2, seed=2)
    again = samples_of(model, PROMPT, only)
    assert len(evaluated) == 3
    assert torch.equal(again.images, made.images)


def model_of(student):
    """The directory of a student's teacher, whose text encoder it has."""
    return orjson.loads((student / "latest/dlmctl.json").read_bytes())["training"]["teacher"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP model with random weights, and its tokenizer."""
    place, parts = tmp_path_factory.mktemp("clip"), text_parts()
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {**parts["text_encoder"].config.to_dict(), **sizes, "num_attention_heads": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = CLIPConfig(
        text_config=CLIPTextConfig(**text).to_dict(),
        vision_config=CLIPVisionConfig(**vision, initializer_factor=5.0).to_dict(),
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(place)
    parts["tokenizer"].save_pretrained(place)
    about = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (place / "preprocessor_config.json").write_bytes(orjson.dumps(about))
    return place, model, parts["tokenizer"], about


def test_clip_scores_are_the_logits_of_transformers_without_their_scale(clip):
    place, model, tokenizer, about = clip
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    scorer = ClipScorer(place, CPU)
    mean, std = (torch.tensor(about[n]).view(3, 1, 1) for n in ("image_mean", "image_std"))
    found = []
    for prompt in (PROMPT, "a cab dab bed ace"):  # the second is too long for the model
        tokens = tokenizer([prompt], truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=((images + 1) / 2 - mean) / std, **tokens)
        wanted = (output.logits_per_image / model.logit_scale.exp()).flatten().double()
        found.append(scorer(images, prompt))
        torch.testing.assert_close(found[-1], wanted, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert found[0].std() > 1e-4


def test_what_is_no_clip_is_refused(clip, tmp_path):
    text_parts()["text_encoder"].save_pretrained(tmp_path / "text")
    with pytest.raises(DataError, match="is a clip_text_model, and --clip takes a CLIPModel"):
        ClipScorer(tmp_path / "text", CPU)
    clip[1].save_pretrained(tmp_path)
    with pytest.raises(MissingInputError, match="--clip needs a tokenizer"):
        ClipScorer(tmp_path, CPU)


def run(*arguments):
    done = invoke("memo-eval", "prompts", *arguments)
    assert done.exit_code == 0, done.stderr
    return orjson.loads(done.stdout), done.stderr


def test_records_and_summary(pipeline, clip, tmp_path):
    prompts, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    records = [
        {"id": n, "caption": text, "label": n % 2, "extra": [n]}
        for n, text in enumerate(("a bed", "bad", "a cab", "dab"))
    ]
    prompts.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in records))
    options = ["-m", pipeline, "-n", 4, "--steps", 3, "--guidance", 3, "--clique-size", 2,
               "--tile-distance", 0.3, "--bootstrap", 50, "--clip", clip[0]]  # fmt: skip
    row, said = run(*options, "--rows", rows, "--set", "role=teacher", prompts)
    kept = [orjson.loads(line) for line in rows.read_bytes().splitlines()]
    plan = Replication(
        count=4, steps=3, guidance=3.0, clique_size=2, tile_distance=0.3, clip=clip[0]
    )
    model, scorer = load_text_pipeline(pipeline, CPU), ClipScorer(clip[0], CPU)
    for record, each in zip(records, kept, strict=True):
        scores = prompt_scores(model, record["caption"], plan, scorer)
        assert each == {**record, **scores}
        made = samples_of(model, record["caption"], plan).images / 127.5 - 1
        assert each["clip"] == pytest.approx(float(scorer(made, record["caption"]).mean()))
    assert (row["role"], row["prompts"], row["members"], row["others"]) == ("teacher", 4, 2, 2)
    assert (row["samples"], row["steps"], row["guidance"]) == (4, 3, 3)
    assert row["model"] == str(pipeline)
    assert row["clip_model"] == str(clip[0])
    assert len(row["clip_revision"]) > 8
    assert "_auc" not in said
    for name, sign in {"noise_norm": 1, "noise_norm_1": 1, "clique": 1, "tile_l2": -1}.items():
        values = torch.tensor([each[name] for each in kept], dtype=torch.float64)
        assert row[name] == pytest.approx(float(values.mean()))
        wanted = separation(sign * values[1::2], sign * values[::2], Bootstrap(50))
        assert row[f"{name}_auc"] == wanted["auc"]
        assert row[f"{name}_auc_interval"] == wanted["auc_interval"]
    assert row["replicated"] == sum(each["replicated"] for each in kept) / 4
    # Records pass through, and are read again.
    again, _ = run(*options, rows)
    assert again["noise_norm"] == row["noise_norm"]


def test_lines_of_text_have_no_labels(pipeline, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a bed\n\nbad\n")
    options = ["-m", pipeline, "--measure", "norm", "-n", 2, "--steps", 4, "--norm-steps", 1]
    row, _ = run(*options, file)
    assert (row["prompts"], row["norm_steps"]) == (2, 1)
    assert row["noise_norm"] == row["noise_norm_1"]
    assert not any(name.endswith("_auc") or name.startswith("clique") for name in row)


def test_faulty_records_say_where_they_are(pipeline, tmp_path):
    file, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "bad", "split": "train"}\n{"other": 1}\n{"prompt": "cab"}\n')
    options = ["-m", pipeline, "--measure", "norm", "-n", 1, "--steps", 1, file, "--rows", rows]
    done = invoke("memo-eval", "prompts", *options)
    assert (done.exit_code, f"{file}:2: no text" in done.stderr) == (65, True)
    assert len(Path(f"{rows}.partial").read_bytes().splitlines()) == 1
    row, said = run(*options, "--on-error", "keep")
    assert row["prompts"] == 2
    assert "1 prompts have no label or split" in said
    assert "error" in orjson.loads(rows.read_bytes().splitlines()[1])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["-n", 5], "-n 5 samples have no clique of --clique-size 10"),
        (["--measure", "norm,size"], "--measure size is not one of norm, clique, clip"),
        (["--measure", "clip"], "--measure clip and --clip DIRECTORY need each other"),
        (["--steps", 3, "--norm-steps", 4], "--norm-steps 4 is more than the 3 of --steps"),
        (["--measure", "norm", "--steps", 2000], "--steps 2000: "),
    ],
)
def test_options_that_make_no_sense(pipeline, tmp_path, options, complaint):
    file = tmp_path / "prompts.txt"
    file.write_text("a bed\n")
    done = invoke("memo-eval", "prompts", "-m", pipeline, *options, file)
    assert (done.exit_code, complaint in done.stderr) == (2, True), done.stderr


def test_a_model_without_texts_is_refused(pipeline, tmp_path):
    pipe = diffusers.DDPMPipeline(unet=tiny(), scheduler=ddim())
    pipe.save_pretrained(tmp_path / "plain")
    done = invoke("memo-eval", "prompts", "-m", tmp_path / "plain")
    assert (done.exit_code, "is for models of texts" in done.stderr) == (2, True)


def tiny():
    from tiny_pipelines import tiny_unet

    return tiny_unet()


def test_labels_and_splits_say_who_is_a_member():
    said = [
        ({"label": 1}, True), ({"label": False}, False), ({"label": "member"}, True),
        ({"split": "train"}, True), ({"split": "heldout"}, False), ({"label": 7}, None),
        ({"label": 7, "split": "test"}, False), ({}, None), ({"split": None}, None),
        ({"label": [1]}, None),
    ]  # fmt: skip
    for record, member in said:
        assert is_member(record) is member


def test_defaults_are_those_of_the_papers():
    plan = Replication()
    assert (plan.samples, plan.steps_of(False), plan.guidance, plan.tiles) == (500, 50, 7.5, 4)
    assert (plan.clique_size, plan.tile_distance) == (10, 0.15)
    assert Replication(measure="norm").samples == 4
    with pytest.raises(UsageError, match="--norm-steps 5 is more than the 4"):
        Replication(norm_steps=5).steps_of(True)
