"""Sampling from a masked diffusion model: LLaDA's block-wise, semi-autoregressive decoding.

The completion starts as G mask tokens in blocks of `block_length`, decided from left to right. In
every step the model predicts all masked tokens of the block at once, and the ones it is most sure
of stay; the others are masked again ("remasking"). A block of B tokens takes B / G of the `steps`.
How many stay: n_t by the `schedule`, over the steps of the block; or with `threshold` every token
with at least this confidence, or by `factor`, at least one, in as many steps as the block takes.

With temperature 0 in float32 this is, token for token, the `generate` of LLaDA (arXiv 2502.09992,
algorithm 5 and its code); `threshold` and `factor` are the parallel decoding of Fast-dLLM (arXiv
2505.22618) and `cache` its approximation; both are off unless asked for. With one block, schedule
`timesteps` and confidence of the `sampled` distribution it is Dream's `diffusion_generate` (arXiv
2508.15487 and its code), but for the mask token, which Dream may sample.

With `edit_threshold` a step also predicts the decided tokens of its block, and replaces one by
another that is more probable than this, as LLaDA2.1 (arXiv 2602.08676 and its code). A block then
ends when nothing in it is masked and a step changed nothing, or after `edit_steps` steps without
masks.

What is not needed is not computed: only positions that may change reach the vocabulary, and in
random order (`remasking` random) only those whose token stays. Each row is at its own step of its
own block; a row that is done leaves and the next request takes its place. Its noise depends on its
key alone, so that a sample does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.canvas import Canvas, Targets
from dlmctl.diffusion.noise import subkeys
from dlmctl.diffusion.passes import Passes
from dlmctl.diffusion.proposals import chance, perturb, predict_tokens, select_to_unmask
from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent
from dlmctl.records.errors import DataError, UsageError


def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], keys: Sequence[int], settings: SamplerConfig
) -> list[Sample]:
    """Sample a completion for each of B prompts, all in one batch; `keys` are their 64-bit keys."""
    requests = [Request(list(p), key) for p, key in zip(prompts, keys, strict=True)]
    return list(sample_stream(policy, requests, settings, len(requests)))


@torch.no_grad()
def sample_stream(
    policy: Policy,
    requests: Iterable[Request],
    settings: SamplerConfig,
    batch_size: int,
    callback: SamplerCallback | None = None,
) -> Iterator[Sample]:
    """Sample a completion for each request, in their order, `batch_size` under way at a time.

    Requests are taken as places become free. Where taking one raises, those under way are finished
    and given out first.
    """
    if callback is None:
        if settings.remasking == "sae":
            raise UsageError("--remasking sae goes by an autoencoder: give one with --sae")
        callback = SamplerCallback()
    source, canvas = _Source(requests), Canvas(policy, settings, batch_size)
    passes = Passes(policy, settings, canvas, callback)
    callback.on_start(canvas)
    done: dict[int, Sample] = {}
    given = 0
    while True:
        # Several at a time, for a pass over one new row costs almost as much as one over a few.
        if len(canvas.free) * 8 >= batch_size:
            for number, request in islice(source, len(canvas.free)):
                callback.on_request(canvas.add(number, request), request)
        if not canvas.active:
            break
        for slot in _denoise(canvas, passes, callback):
            callback.on_finish(slot)
            done.update([canvas.take(slot)])
        while given in done:
            yield done.pop(given)
            given += 1
    if source.failure is not None:
        raise source.failure


class _Source:
    """Numbered requests, up to the first that cannot be had."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._numbered = enumerate(requests)
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        return self

    def __next__(self) -> tuple[int, Request]:
        try:
            return next(self._numbered)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise StopIteration from None


def _denoise(canvas: Canvas, passes: Passes, callback: SamplerCallback) -> list[int]:
    """One step of every row under way; returns the slots whose completion is done."""
    rows, settings, device = canvas.active, canvas.settings, canvas.device
    canvas.skip_idle_steps(rows)
    on_host, steps = canvas.targets(rows), canvas.step_numbers(rows)
    keys = subkeys(canvas.keys[rows], torch.tensor(steps))
    # 1. In random order, the tokens that stay are known before the pass; only they are predicted.
    known = settings.blind and not callback.adjusts
    if known:
        noise = subkeys(keys[on_host.row], on_host.completion)
        stays, _ = _which_stay(canvas, rows, on_host, chance(noise), noise)
        on_host, noise = on_host.at(stays), sent(noise[stays], device)
        targets = on_host.to(device)
    else:
        targets = on_host.to(device)
        noise = subkeys(sent(keys, device)[targets.row], targets.completion)
    # 2. What the model predicts, how sure it is, and which tokens stay.
    states = passes.states(rows, on_host)
    token, sure = predict_tokens(canvas.policy, states, noise, settings)
    if known:
        written = torch.ones_like(token, dtype=torch.bool)
        repeated = torch.zeros(len(rows), dtype=torch.bool, device=device)
    else:
        sure = callback.adjust_confidence(targets, states, sure)
        stays, surest = _which_stay(canvas, rows, targets, sure, noise)
        repeated = passes.outdated(rows, surest)
        written = (stays & ~repeated[targets.row]) | canvas.replaced(targets, token, sure)
    canvas.write(targets, written, token)
    # 3. The one wait of a step: the host fetches what was decided.
    fetched = torch.cat([written, sure.isnan(), repeated, token]).cpu()
    n = len(token)
    writes, unsure, again, tokens = fetched.split([n, n, len(rows), n])
    if unsure.any():
        raise DataError(
            f"{canvas.policy.name} predicts NaN: its weights are damaged, or too large for "
            "--dtype float16"
        )
    canvas.decide(on_host, writes.bool(), tokens, steps)
    repeating = again.bool().tolist()
    passes.repeat(rows, repeating)
    changed = set(on_host.row[writes.bool()].tolist()) if settings.editing else set()
    return canvas.advance(rows, passes.per_step, repeating, changed)


def _which_stay(
    canvas: Canvas, rows: Sequence[int], targets: Targets, sure: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Which targets are sure enough to stay, bool [N], and the most confidence in each row, [R].

    Args:
        sure: float64 [N], the confidence of each target.
        noise: int64 [N], its key.
    """
    settings, device = canvas.settings, sure.device
    sure = sure.where(targets.masked, -torch.inf)
    confidence = torch.full(targets.shape, -torch.inf, dtype=torch.float64, device=device)
    confidence[targets.row, targets.offset] = sure
    ranking = confidence
    if settings.alg_temp:
        ranking = confidence.clone()
        ranking[targets.row, targets.offset] = perturb(sure, noise, settings)
    stays = select_to_unmask(ranking, sent(canvas.quotas(rows), device), settings)
    return stays[targets.row, targets.offset], confidence.amax(dim=1)
