"""The stage `rollout`: prompt records in, one record per sampled completion out.

Prompts are read as they come and a batch starts as soon as it is full, so that memory holds one
batch and the first record leaves before the last prompt arrives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dlmctl.diffusion.autoregressive import sample_autoregressive
from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.noise import stream_key
from dlmctl.diffusion.sampler import sample_stream
from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig
from dlmctl.diffusion.served import ServedSampler
from dlmctl.models.policy import Policy
from dlmctl.records.jsonl import OnError, Record, each, field
from dlmctl.records.resume import Begins, always
from dlmctl.tasks.images import image_sources


class Round(NamedTuple):
    """Where in a training loop the samples are made; written into every record."""

    number: int
    size: int
    """Completions in the round."""
    max_lag: int
    """Rounds that its weights may be old."""

    def place(self) -> dict[str, int]:
        """As it stands in a record."""
        return {"round": self.number, "round_size": self.size, "max_lag": self.max_lag}


def rollout(
    records: Iterable[Record],
    policy: Policy,
    settings: SamplerConfig,
    samples: int,
    seed: int,
    batch_size: int,
    on_error: OnError = "fail",
    round_: Round | None = None,
    callback: SamplerCallback | None = None,
    served: ServedSampler | None = None,
) -> Iterator[Record]:
    """Sample `samples` completions for every prompt; a group leaves as neighbours, in order.

    Args:
        served: samples in the place of the policy, which then needs no weights.

    Raises:
        UsageError: the settings, or a callback, do not go with the kind of model.
    """
    # What was read and not yet answered: a record with its number in the group, or an error.
    waiting: deque[tuple[Record, int]] = deque()

    def requests() -> Iterator[Request]:
        for record in with_prompt_ids(records, policy, on_error):
            if "error" in record:
                waiting.append((record, -1))
                continue
            for index in range(samples):
                waiting.append((record, index))
                key = stream_key(seed, round_.number if round_ else 0, record["id"], index)
                yield Request(record["tokens"]["prompt"], key, record)

    if served is not None:
        results = served.sample(policy, requests(), settings, batch_size)
    elif policy.diffusion:
        results = sample_stream(policy, requests(), settings, batch_size, callback)
    else:
        results = sample_autoregressive(policy, requests(), settings, batch_size, callback)
    for result in results:
        while waiting[0][1] < 0:
            yield waiting.popleft()[0]
        record, index = waiting.popleft()
        yield _completed(record, index, result, policy, settings, samples, seed, round_)
    yield from (record for record, _ in waiting)


def with_prompt_ids(
    records: Iterable[Record], policy: Policy, on_error: OnError
) -> Iterator[Record]:
    """The records with the ids of their prompts; those that have none as `on_error` says."""

    def prepare(record: Record) -> Record:
        ready = Record(record)
        ready.where = record.where
        ready["id"] = field(record, "id", (str, int), "'dlmctl prompts' writes it")
        ready["tokens"] = {**(record.get("tokens") or {}), "prompt": policy.encode(record)}
        return ready

    return each(records, prepare, on_error)


def made_by(policy: Policy, settings: SamplerConfig, samples: int, seed: int) -> dict[str, Any]:
    """What of a completion's `rollout` is the same for all that a command samples."""
    return {
        "model": policy.name,
        "revision": policy.revision,
        "seed": seed,
        "samples": samples,
        "temperature": settings.temperature,
        "sampler": settings.used(policy.diffusion),
    }


def batch_begins(
    policy: Policy, settings: SamplerConfig, batch_size: int, served: bool = False
) -> Begins:
    """Where a batch that nothing earlier is part of begins, for `records.resume`.

    Rows that take the same number of steps come and go together. Where a row may be done early, and
    in a server, there is no such place: a completion is then made again among others, and is the
    same but for floating-point noise, which can tip a choice only where two tokens are all but
    equally sure.
    """
    early = settings.parallel or settings.early_stop or settings.refresh_below > 0
    early |= settings.ancestral or settings.editing
    if served or (policy.diffusion and early):
        return always
    return lambda _, made: (made.lines - made.errors) % batch_size == 0


def _completed(
    record: Record,
    index: int,
    result: Sample,
    policy: Policy,
    settings: SamplerConfig,
    samples: int,
    seed: int,
    round_: Round | None,
) -> Record:
    done = Record(record)
    done.where = record.where
    done["sample"] = index
    done["completion"] = policy.decode(result.tokens)
    done["tokens"] = {"prompt": record["tokens"]["prompt"], "completion": result.tokens}
    pictures = policy.pictures(record)
    done["rollout"] = {
        "model": policy.name,
        "revision": policy.revision,
        **(round_.place() if round_ else {}),
        "seed": seed,
        "samples": samples,
        "temperature": settings.temperature,
        "sampler": settings.used(policy.diffusion),
        **({"images": [p.digest for p in pictures]} if image_sources(record) else {}),
        "nfe": result.nfe,
        "order": result.order,
        **({} if result.edits is None else {"edits": result.edits}),
        **_recorded(result, policy),
        "length": policy.length(result.tokens),
        "finish": "length" if policy.ends.isdisjoint(result.tokens) else "eos",
    }
    return done


def _recorded(result: Sample, policy: Policy) -> dict[str, Any]:
    """Log-probabilities that sampling gave, and the precision of the model that gave them.

    A server does not say its precision.
    """
    engine = {} if result.engine is None else {"engine": result.engine}
    if result.log_probs is None:
        return engine
    if engine:
        return {**engine, "log_probs": result.log_probs}
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    return {"log_probs": result.log_probs, "dtype": dtype}
