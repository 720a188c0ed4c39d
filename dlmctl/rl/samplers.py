"""The weights that completions were sampled from, which ratios are taken to.

A run changes its weights at every step. Where later batches have been sampled from those of now,
as all batches of a round of `rollout --follow` are, a copy of the trained weights stays in main
memory, and changes places with them while the later batches are scored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from torch import Tensor

from dlmctl.diffusion.elbo import Example, log_probs
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.quantization import quantization_of
from dlmctl.records.errors import DataError, UserFacingError
from dlmctl.records.jsonl import Record, object_field
from dlmctl.rl.batches import StepBatch, max_lag, sampled_from
from dlmctl.rl.policy_gradient import Scorer
from dlmctl.train.distributed import world_size
from dlmctl.train.run import Run
from dlmctl.train.sharding import own_share, shard


def reference_log_probs(run: Run, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Log-probabilities [N, K, G] of the target tokens under a run's frozen reference."""
    with run.reference() as reference:
        return log_probs(reference, examples, batch_size)


class Samplers:
    """Finds the weights of a revision: those kept, the reference, or the model that is named."""

    def __init__(self, run: Run, batch_size: int) -> None:
        self._run = run
        self._batch_size = batch_size
        self._kept: dict[str, list[Tensor]] = {}
        """Trained weights by revision, the oldest first."""
        self._loaded: Policy | None = None

    def keep(self, batch: StepBatch) -> None:
        """Copy the weights of now, before a step, if batches sampled from them may follow."""
        run, revision = self._run, self._run.policy.revision
        lag = max(map(max_lag, batch.rows))
        more = batch.finished_round is None and revision in map(sampled_from, batch.rows)
        if revision in run.revisions and (more or lag):
            self._kept.pop(revision, None)
            self._kept[revision] = [own_share(p).to("cpu", copy=True) for p in self._trained()]
            for old in [*self._kept][: -(lag + 1)]:
                del self._kept[old]

    def __call__(self, record: Record) -> Scorer:
        """Scores under the weights that a record was sampled from.

        Raises:
            DataError: they are not there.
        """
        revision = sampled_from(record)
        if revision in self._kept:
            return functools.partial(self._under_kept, revision)
        if revision == self._run.progress.reference_revision:
            return lambda examples: reference_log_probs(self._run, examples, self._batch_size)
        policy = self._named(record)
        return lambda examples: log_probs(policy, examples, self._batch_size)

    def _trained(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._run.parameters.values()]

    def _under_kept(self, revision: str, examples: Sequence[Example]) -> Tensor:
        with self._exchanged(self._kept[revision]):
            return log_probs(self._run.policy, examples, self._batch_size)

    @contextlib.contextmanager
    def _exchanged(self, kept: list[Tensor]) -> Iterator[None]:
        """Within the block the trained weights are those kept, which wait in their place."""

        def exchange() -> None:
            for parameter, other in zip(self._trained(), kept, strict=True):
                now = own_share(parameter).to("cpu", copy=True)
                own_share(parameter).copy_(other)
                other.copy_(now)

        exchange()
        try:
            yield
        finally:
            exchange()

    def _named(self, record: Record) -> Policy:
        """The model that a record names, if it has the weights that the record was sampled from."""
        own, revision = self._run.policy, sampled_from(record)
        if self._loaded is not None and self._loaded.revision == revision:
            return self._loaded
        self._loaded = None  # one at a time is in memory
        try:
            dtype = str(next(own.model.parameters()).dtype).removeprefix("torch.")
            name = str(object_field(record, "rollout").get("model"))
            below = quantization_of(revision or "")
            policy = load_policy(name, str(own.device), dtype, quantize=below)
        except UserFacingError as error:
            raise self._refusal(record, str(error)) from None
        if policy.revision != revision or policy.diffusion != own.diffusion:
            raise self._refusal(record, f"{policy.name} has others now")
        if world_size() > 1:
            shard(policy, self._run.compute_dtype)
        self._loaded = policy
        return policy

    def _refusal(self, record: Record, reason: str) -> DataError:
        return DataError(
            f"--algo {self._run.progress.algo} takes ratios to the weights that this was sampled "
            f"from, {sampled_from(record)}, which are not there any more ({reason}): put them back "
            "under the name that the record has in 'rollout.model', sample again from this run, or "
            "choose an algorithm that takes no ratios (rspo, wd1, spg, vrpo)",
            record.where,
        )
