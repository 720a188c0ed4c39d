"""Sampling from a masked diffusion model: LLaDA's block-wise, semi-autoregressive decoding.

The completion starts as G mask tokens in blocks of `block_length`, decided from left to right. In
every step the model predicts all masked tokens of the block at once, and the ones it is most sure
of stay; the others are masked again ("remasking"). A block of B tokens takes B / G of the `steps`.

    token       argmax_v  logit_v + temperature * Gumbel noise        (exact Gumbel-max, float64)
    confidence  low_confidence  p(token)             random   U(0, 1)
                entropy         -H(p)                margin   p(best) - p(second)
    kept        the n_t most confident, n_t as even as possible over the steps of the block, or
                with `threshold` every token with confidence above it (at least one)

With temperature 0 in float32 this is, token for token, the `generate` of LLaDA (arXiv 2502.09992,
algorithm 5 and its code); `threshold` is the parallel decoding of Fast-dLLM (arXiv 2505.22618).
Guidance is LLaDA's: logits = uncond + (cfg_scale + 1) * (cond - uncond), prompt masked in uncond.

Rows have their own prompts, right-padded with an attention mask; their noise depends on their key
alone, so that a sample does not depend on the batch that it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import gumbel, key_tensor, subkeys, uniform
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

Remasking = Literal["low_confidence", "random", "entropy", "margin"]
EosRule = Literal["normal", "late", "never"]


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler; the names are LLaDA's."""

    gen_length: int = 128
    """Tokens of the completion."""
    block_length: int = 32
    """Tokens of a block; the last block may be shorter."""
    steps: int = 128
    """Denoising steps over all blocks."""
    temperature: float = 0.0
    cfg_scale: float = 0.0
    """Classifier-free guidance; 0 is off."""
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    """Keep every token with confidence above this; None keeps a fixed number per step."""
    eos: EosRule = "normal"
    """late: end-of-sequence is decided last in its block; never: it is not sampled at all."""
    early_stop: bool = False
    """End a row when a finished block holds end-of-sequence; the rest is filled with it."""

    def __post_init__(self) -> None:
        if min(self.gen_length, self.block_length, self.steps) < 1:
            raise UsageError("--gen-length, --block-length and --steps are at least 1")
        if self.steps < self.blocks:
            raise UsageError(
                f"--steps {self.steps} is less than one step for each of the {self.blocks} blocks "
                f"(--gen-length {self.gen_length} / --block-length {self.block_length})"
            )

    @property
    def blocks(self) -> int:
        return -(-self.gen_length // self.block_length)


def settings_for(policy: Policy, **given: Any) -> Sampling:
    """Settings as given; lengths and steps that are None are the model's own, else LLaDA's."""
    own = {key: value for key, value in given.items() if value is not None}
    gen_length = own.get("gen_length", policy.sampling.get("gen_length", 128))
    lengths = {
        "gen_length": gen_length,
        "block_length": min(gen_length, policy.sampling.get("block_length", 32)),
        "steps": gen_length if "gen_length" in own else policy.sampling.get("steps", gen_length),
    }
    return Sampling(**{**lengths, **own})


class Sample(NamedTuple):
    """One completion."""

    tokens: list[int]
    """All `gen_length` ids, those after the first end-of-sequence included."""
    order: list[int]
    """Step, counted from 0 over all blocks, at which each token was decided."""
    nfe: int
    """Forward passes that the row took part in."""


def tokens_per_step(masked: int, steps: int) -> list[int]:
    """How many of `masked` tokens each step decides: as even as possible, the first ones more."""
    base, rest = divmod(masked, steps)
    return [base + (step < rest) for step in range(steps)]


@torch.no_grad()
def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], keys: Sequence[int], settings: Sampling
) -> list[Sample]:
    """Sample a completion for each prompt.

    Args:
        prompts: B sequences of token ids.
        keys: B 64-bit keys that the noise of each row comes from.
    """
    canvas = _Canvas(policy, prompts, settings.gen_length)
    noise_keys = key_tensor(list(keys), policy.device)
    steps = settings.steps // settings.blocks
    active = list(range(len(prompts)))
    for block in range(settings.blocks):
        start = block * settings.block_length
        stop = min(start + settings.block_length, settings.gen_length)
        quota = tokens_per_step(stop - start, steps)
        for i in range(steps):
            # Counted as if every block took all its steps, so that neighbours do not matter.
            step = block * steps + i
            rows = [b for b in active if canvas.masked(b, start, stop)]
            if not rows or (settings.threshold is None and quota[i] == 0):
                break
            tokens, confidence = _propose(
                canvas, rows, range(start, stop), subkeys(noise_keys, torch.tensor(step)), settings
            )
            if settings.threshold is None:
                keep = _most_confident(confidence, quota[i])
            else:
                keep = (confidence > settings.threshold) | _most_confident(confidence, 1)
                if i == steps - 1:
                    keep = confidence > -torch.inf
            canvas.decide(rows, start, stop, tokens, keep, step)
        if settings.early_stop:
            last = (block + 1) * steps - 1
            active = [b for b in active if not canvas.stop_at_eos(b, stop, last)]
    return canvas.samples(passes=2 if settings.cfg_scale > 0 else 1)


def _propose(
    canvas: _Canvas, rows: list[int], block: range, keys: Tensor, settings: Sampling
) -> tuple[Tensor, Tensor]:
    """A token and a confidence for every masked position of the block.

    Returns:
        tokens: int64 [R, block], current tokens where nothing is masked.
        confidence: float64 [R, block], -inf where nothing is masked.
    """
    policy = canvas.policy
    ids = canvas.completion[rows, block.start : block.stop]
    masked = ids == policy.mask_id
    row, offset = masked.nonzero(as_tuple=True)
    logits = canvas.logits(rows, row, offset + block.start, settings.cfg_scale)
    scores = logits.double()
    if settings.eos == "never" and policy.eos_id is not None:
        scores[:, policy.eos_id] = -torch.inf

    # The mask token is a state of the process, not an outcome: it is never sampled.
    choice = scores.clone()
    choice[:, policy.mask_id] = -torch.inf
    where = subkeys(keys[rows][row], offset + block.start)
    if settings.temperature > 0:
        vocabulary = torch.arange(scores.shape[1], device=scores.device)
        choice += settings.temperature * gumbel(where[:, None], vocabulary[None])
    token = choice.argmax(dim=1)
    sure = _confidence(scores, token, where, settings.remasking)
    if settings.eos == "late" and policy.eos_id is not None:
        # Finite, so that end-of-sequence still comes before positions that are not masked.
        sure = torch.where(token == policy.eos_id, sure - 1e9, sure)

    tokens, confidence = ids.clone(), torch.full_like(ids, -torch.inf, dtype=torch.float64)
    tokens[row, offset], confidence[row, offset] = token, sure
    return tokens, confidence


def _confidence(scores: Tensor, token: Tensor, keys: Tensor, remasking: Remasking) -> Tensor:
    """float64 [N]: how sure the model is at temperature 1, for scores [N, V]."""
    if remasking == "random":
        return uniform(keys, torch.full_like(keys, -1))
    if remasking == "low_confidence":
        return (scores.gather(1, token[:, None])[:, 0] - scores.logsumexp(dim=1)).exp()
    probabilities = scores.softmax(dim=1)
    if remasking == "margin":
        best = probabilities.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]
    return torch.special.xlogy(probabilities, probabilities).sum(dim=1)


def _most_confident(confidence: Tensor, count: int) -> Tensor:
    """bool [R, block]: the `count` most confident positions of each row that are masked at all."""
    best = confidence.topk(min(count, confidence.shape[1]), dim=1).indices
    keep = torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, best, True)
    return keep & (confidence > -torch.inf)


class _Canvas:
    """The completions under way, and the padded model input that holds them."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], gen_length: int) -> None:
        self.policy = policy
        device, rows = policy.device, len(prompts)
        self.starts = torch.tensor([len(p) for p in prompts], device=device)
        width = max(len(p) for p in prompts)
        self.prompt = torch.full((rows, width), policy.pad_id, dtype=torch.int64)
        for b, ids in enumerate(prompts):
            self.prompt[b, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        self.prompt = self.prompt.to(device)
        self.completion = torch.full(
            (rows, gen_length), policy.mask_id or 0, dtype=torch.int64, device=device
        )
        self.order = torch.zeros_like(self.completion)
        self.passes = [0] * rows

    def masked(self, row: int, start: int, stop: int) -> bool:
        return bool((self.completion[row, start:stop] == self.policy.mask_id).any())

    def inputs(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Model input [R, T] of these rows, the padding behind the completion, and its mask."""
        starts, completion = self.starts[rows], self.completion[rows]
        width, gen_length = int(starts.max()), completion.shape[1]
        ids = torch.full(
            (len(rows), width + gen_length), self.policy.pad_id, device=completion.device
        )
        ids[:, :width] = self.prompt[rows, :width]
        places = starts[:, None] + torch.arange(gen_length, device=completion.device)
        ids.scatter_(1, places, completion)
        if bool((starts == width).all()):
            return ids, None
        columns = torch.arange(ids.shape[1], device=ids.device)
        return ids, columns < (starts + gen_length)[:, None]

    def logits(self, rows: list[int], row: Tensor, position: Tensor, cfg_scale: float) -> Tensor:
        """Logits [N, V] for completion positions of the rows; `row` indexes into `rows`."""
        for b in rows:
            self.passes[b] += 1
        ids, attention = self.inputs(rows)
        starts = self.starts[rows]
        where = starts[row] + position
        logits = self.policy.predict(ids, attention, row, where)
        if cfg_scale <= 0:
            return logits
        columns = torch.arange(ids.shape[1], device=ids.device)
        blind = torch.where(columns < starts[:, None], self.policy.mask_id or 0, ids)
        unconditional = self.policy.predict(blind, attention, row, where)
        return unconditional + (cfg_scale + 1) * (logits - unconditional)

    def decide(
        self, rows: list[int], start: int, stop: int, tokens: Tensor, keep: Tensor, step: int
    ) -> None:
        now = self.completion[rows, start:stop]
        self.completion[rows, start:stop] = torch.where(keep, tokens, now)
        order = self.order[rows, start:stop]
        self.order[rows, start:stop] = torch.where(keep, step, order)

    def stop_at_eos(self, row: int, stop: int, step: int) -> bool:
        """Fill the rest of a row whose decided part holds end-of-sequence."""
        eos = self.policy.eos_id
        if eos is None or not bool((self.completion[row, :stop] == eos).any()):
            return False
        self.completion[row, stop:] = eos
        self.order[row, stop:] = step
        return True

    def samples(self, passes: int) -> list[Sample]:
        tokens, order = self.completion.tolist(), self.order.tolist()
        return [
            Sample(t, o, passes * n) for t, o, n in zip(tokens, order, self.passes, strict=True)
        ]
