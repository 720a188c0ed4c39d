"""Sampling by inference servers (`rollout --engine`) in the place of our own sampler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields

from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig
from dlmctl.engines.protocol import Answer, Generation
from dlmctl.engines.server import Server
from dlmctl.engines.spread import Spread
from dlmctl.engines.weightless_policy import weights_of
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.settings.rollout import Engines
from dlmctl.settings.sampler import Sampler

SEEDS = 2**31
"""Number of seeds that every engine tells apart."""
KEPT = ("gen_length", "temperature", "top_p", "top_k")
"""Options of the sampler that an engine has, too."""


class ServedSampler:
    """The servers of a command, which answer requests in the place of our own sampler."""

    def __init__(self, engines: Engines, sampler: Sampler, follows: bool) -> None:
        """Args:
            follows: whether servers load the weights that are sampled from, in a training loop.

        Raises:
            UsageError: an option is given that only our own sampler has, or no URL.
            UnavailableError: a package is missing.
        """
        for option in fields(Sampler):
            if option.name not in KEPT and getattr(sampler, option.name) != option.default:
                flag = "--" + option.name.replace("_", "-")
                raise UsageError(f"{flag} is of dlmctl's own sampler, which --engine replaces")
        self._servers = [Server(url, engines.engine_timeout) for url in engines.urls]
        self._follows = follows

    def sample(
        self, policy: Policy, requests: Iterable[Request], settings: SamplerConfig, at_a_time: int
    ) -> Iterator[Sample]:
        """A completion for each request, in their order.

        Args:
            policy: whose weights the servers have, or load.
            at_a_time: requests under way at each server.

        Raises:
            TryAgainError: no server is left.
            UserFacingError: a server serves something else, or its answer cannot be used.
        """
        weights = weights_of(policy, self._follows)
        for server in self._servers:
            server.begin(weights)
        generations = (_generation(policy, request, settings) for request in requests)
        for answer in Spread(self._servers, at_a_time).answers(generations):
            yield _sample(answer)


def _generation(policy: Policy, request: Request, settings: SamplerConfig) -> Generation:
    return Generation(
        prompt=request.prompt,
        seed=request.key % SEEDS,
        length=settings.gen_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        ends=sorted(policy.ends),
        vocab_size=policy.vocab_size,
        where=request.record.where if request.record else "",
    )


def _sample(answer: Answer) -> Sample:
    steps = len(answer.tokens)
    order = list(range(steps)) if answer.order is None else answer.order
    return Sample(answer.tokens, order, steps, answer.log_probs, engine=answer.engine)
