"""Whether a text-to-image model replicates training images for a prompt, without these images.

    noise_norm  |eps(x_t, text) - eps(x_t, empty)|, a mean over steps and samples (Wen et al. 2024,
                arXiv 2407.21720): large for texts that are memorized
    clique      the largest number of samples that are near duplicates of each other (Carlini et al.
                2023, arXiv 2301.13188); see `near_duplicates`
    clip        cosine of image and text by CLIP, to compare models that follow prompts equally

eps is the noise that the network predicts, whatever it is parameterized as: (x - D) / sigma in the
coordinates of EDM. A teacher follows DDIM with eta 0 and guidance over the timesteps that
DDIMScheduler of diffusers has for its process, as in the code of Wen et al. What is said of
students is ours: one is sampled over the timesteps of its LCMScheduler, and takes the same guidance
scale with either text. It has never seen the empty text in training, so that its noise_norm is to
be compared with that of other prompts or of other students, not with its teacher's.

Sample i starts from the same noise for every prompt and model (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.distill.consistency_model import sample_steps
from dlmctl.distill.diffusers_directories import diffusers_class, first_line
from dlmctl.distill.diffusers_models import sampler_levels
from dlmctl.distill.diffusers_networks import (
    DiffusersConfig,
    DiscreteUnet,
    LatentConsistencyModel,
    log_levels,
)
from dlmctl.distill.edm import each, solve
from dlmctl.distill.guided_consistency import Conditioned
from dlmctl.distill.image_sampling import sample_noise
from dlmctl.distill.text_pipelines import TextPipeline
from dlmctl.memorization.images.image_bytes import rgb_bytes
from dlmctl.memorization.images.image_encoder import ClipScorer
from dlmctl.memorization.images.near_duplicates import largest_clique, tile_distances
from dlmctl.records.errors import UsageError
from dlmctl.settings.replication import Replication

MEMBERS, OTHERS = ("train", "member", "memorized"), ("test", "heldout", "validation", "other")
"""Texts of `split` and `label` that say whether a prompt's image was in the training set."""


class Samples(NamedTuple):
    """What a model made of a text."""

    norms: Tensor
    """float64 [N, S]: the norm of the text's part of the noise, in the steps that were taken."""
    images: Tensor | None
    """uint8 [N, 3, H, W] on the CPU; None if the sampler did not go to its end."""


class TextNoise(DiscreteUnet):
    """A network given a text that records how far its noise is from that without a text.

    `denoise` is D given the text, for a teacher with guidance.
    """

    def __init__(self, model: TextPipeline, text: Tensor, guidance: float, norms: bool) -> None:
        """Bind a text for each row.

        Args:
            text: states of the text encoder, float [N, L, E].
            guidance: the scale, as diffusers counts it.
            norms: record the norms.
        """
        process = model.process
        strength = torch.full((len(text),), guidance - 1, device=model.device)
        taken = strength if model.is_student else None
        given = Conditioned(process.unet, text, taken)
        super().__init__(given, process.table, process.prediction)
        empty = Conditioned(process.unet, process.empty.expand_as(text), taken)
        self.empty = DiscreteUnet(empty, process.table, process.prediction)
        self.weight = 0.0 if model.is_student else guidance - 1
        self.records = norms
        self.norms: list[Tensor] = []
        """float64 [N] for each evaluation."""

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `DiscreteUnet.denoise`."""
        data = super().denoise(x, sigma)
        if not (self.records or self.weight):
            return data
        of_text = data - self.empty.denoise(x, sigma)
        noise = of_text.double() / each(sigma, of_text.double())
        self.norms.append(noise.flatten(1).norm(dim=1))
        return data + self.weight * of_text


def levels(config: DiffusersConfig, steps: int) -> Tensor:
    """The levels of a sampler's steps, float64 [steps]: of DDIM for a teacher.

    Raises:
        UsageError: the scheduler cannot take this number of steps.
    """
    if (of_student := sampler_levels(config, steps)) is not None:
        return of_student
    scheduler = diffusers_class("DDIMScheduler").from_config(dict(config.scheduler))
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UsageError(f"--steps {steps}: {first_line(error)}") from None
    return log_levels(scheduler.alphas_cumprod)[scheduler.timesteps].exp()


@torch.no_grad()
def samples_of(model: TextPipeline, text: str, plan: Replication) -> Samples:
    """Samples of a text; the sampler ends after the steps of the norm if no image is needed.

    Raises:
        UsageError: as `levels`; or the norm is of more steps than there are.
    """
    steps = plan.steps_of(model.is_student)
    sigmas, shape = levels(model.config, steps), model.config.shape
    if not plan.images:
        sigmas = sigmas[: plan.norm_steps or steps]
    states = model.encode([text])
    norms, images = [], []
    for first in range(0, plan.samples, plan.batch_size):
        batch = range(first, min(plan.samples, first + plan.batch_size))
        given = states.expand(len(batch), -1, -1)
        network = TextNoise(model, given, plan.guidance, "norm" in plan.measures)
        # x_T ~ N(0, I) in the coordinates of diffusers.
        scale = math.sqrt(1 + float(sigmas[0]) ** 2)
        x = scale * sample_noise(plan.seed, batch, shape).to(model.device)
        if model.is_student:
            ends = model.noise.sigma_min
            student = LatentConsistencyModel(network, ends, model.scaling)

            def fresh(step: int, batch: range = batch) -> Tensor:
                return sample_noise(plan.seed, batch, shape, step).to(model.device)

            x = sample_steps(student, x, sigmas, 0.0, fresh)
        else:
            x = solve(network.denoise, x, sigmas, "euler")
        norms += [torch.stack(network.norms, 1).cpu()] if network.norms else []
        if plan.images:
            decoded = model.autoencoder.decode(x)
            images.append(rgb_bytes(decoded, "memo-eval prompts").cpu())
    return Samples(
        torch.cat(norms) if norms else torch.empty(plan.samples, 0),
        torch.cat(images) if images else None,
    )


def prompt_scores(
    model: TextPipeline, text: str, plan: Replication, clip: ClipScorer | None
) -> dict[str, Any]:
    """The measures of a prompt, as fields of a record.

    Raises:
        UsageError: as `samples_of` and `tile_distances`.
    """
    made = samples_of(model, text, plan)
    row: dict[str, Any] = {}
    if "norm" in plan.measures:
        row["noise_norm"] = float(made.norms[:, : plan.norm_steps].mean())
        row["noise_norm_1"] = float(made.norms[:, 0].mean())
    if "clique" in plan.measures and made.images is not None:
        distances = tile_distances(made.images.to(model.device), plan.tiles)
        clique, certain = largest_clique(distances <= plan.tile_distance)
        first, second = torch.triu_indices(*distances.shape, offset=1)
        row |= {"clique": len(clique), "clique_exact": certain, "clique_samples": clique}
        row["replicated"] = len(clique) >= plan.clique_size
        row["tile_l2"] = float(distances[first, second].mean())
    if clip and made.images is not None:
        row["clip"] = float(clip(made.images / 127.5 - 1, text).mean())
    return row


def is_member(record: Mapping[str, Any]) -> bool | None:
    """Whether a prompt's image was in the training set, by `label` or `split`; None: not said."""
    label, split = record.get("label"), record.get("split")
    if label in (0, 1):  # and False, True
        return bool(label)
    value = next((each for each in (label, split) if each in (*MEMBERS, *OTHERS)), None)
    return None if value is None else value in MEMBERS
