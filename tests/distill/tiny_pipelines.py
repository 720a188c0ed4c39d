"""Small pipelines of diffusers with fixed weights; imported after pytest.importorskip."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dlmctl.distill.image_runs import student_config, student_run
from dlmctl.distill.image_sampling import draw, levels
from dlmctl.settings.distill import Distillation
from dlmctl.settings.images import NetworkSizes, Training

SIDE = 8


def tiny_unet(channels: int = 3, seed: int = 0, **changes) -> UNet2DModel:
    torch.manual_seed(seed)
    about = {
        "sample_size": SIDE,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**about, **changes}).eval()


def tiny_vae(latents: int = 4, seed: int = 1) -> AutoencoderKL:
    """From 16 x 16 pixels to 8 x 8 latents."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.3,
    ).eval()


def ddim(**changes) -> DDIMScheduler:
    return DDIMScheduler(**{"clip_sample": False, **changes})


def saved(place, scheduler, unet=None, **parts):
    """The directory of a pipeline."""
    kind = diffusers.LDMPipeline if parts else diffusers.DDPMPipeline
    kind(unet=unet or tiny_unet(), scheduler=scheduler, **parts).save_pretrained(place)
    return str(place)


def in_float64(model):
    model.network.double()
    return model


def points(model, count=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, *model.shape, generator=random, dtype=torch.float64)


def pixels(samples):
    """As pipelines return them."""
    return (samples / 2 + 0.5).clamp(0, 1)


def from_numpy(made):
    """What a pipeline made, [N, C, H, W]."""
    return torch.from_numpy(made.images).permute(0, 3, 1, 2)


def distilled(place, teacher, data=None, steps=1, **plan):
    plan = Distillation(**{"objective": "cd", **plan})
    data = torch.rand(6, *teacher.shape) * 2 - 1 if data is None else data
    config = student_config(teacher, tuple(data.shape[1:]), plan, NetworkSizes())
    recipe = Training(steps, 4, 1e-3, warmup=0, checkpoints=1, ema=0.5)
    run = student_run(place, config, plan, teacher, data, recipe, {})
    list(run.train(1, 1e9))
    return str(place / "latest")


def agrees_with(pipe, model, steps):
    """Both sample from the same noise, ours and, by its generator, that of diffusers."""
    pipe.set_progress_bar_config(disable=True)
    # In float32 a prediction of noise is multiplied by sigma = 157, and its rounding with it.
    tolerance = 1e-4 if pipe.scheduler.config.prediction_type == "epsilon" else 1e-6
    for dtype, atol in ((torch.float32, tolerance), (torch.float64, 1e-6)):
        pipe.unet.to(dtype)
        model.network.to(dtype)
        pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(dtype)
        random = torch.Generator().manual_seed(2)
        expected = from_numpy(pipe(3, random, num_inference_steps=steps, output_type="np"))
        random = torch.Generator().manual_seed(2)
        drawn = [torch.randn(3, *model.shape, generator=random, dtype=dtype) for _ in range(steps)]
        with pytest.MonkeyPatch.context() as patch:
            name = "dlmctl.distill.image_sampling.sample_noise"
            patch.setattr(name, lambda seed, samples, shape, step=0, drawn=drawn: drawn[step])
            found = draw(model, 3, 0, levels(model, steps))
        assert found.dtype == dtype
        torch.testing.assert_close(pixels(found), expected, rtol=0, atol=atol)
        assert expected.std() > 0.01


def text_parts():
    letters = list("abcde")
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    torch.manual_seed(5)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=20.0,
    )
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=6)
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def save_text_pipeline(place, **scheduler):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    StableDiffusionPipeline(
        unet=unet.eval(),
        scheduler=ddim(**{"prediction_type": "v_prediction", **scheduler}),
        vae=tiny_vae(),
        **text_parts(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(place)
    return place
