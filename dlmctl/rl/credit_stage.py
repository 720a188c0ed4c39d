"""The second half of `advantage --algo srpo`: a weight for every token of every completion.

Weights are made here rather than in `update`, so that they depend on no batch of a trainer, and can
be looked at. They are those of the policy that sampled the completion; in a training loop its
checkpoint is loaded again whenever the records come from a newer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dlmctl.models.loading import load_policy, reload_policy, run_of
from dlmctl.models.policy import Policy
from dlmctl.models.quantization import quantization_of
from dlmctl.models.token_text import TokenTexts
from dlmctl.records.errors import DataError
from dlmctl.records.groups import group_batches
from dlmctl.records.jsonl import OnError, Record, faulty, field, object_field
from dlmctl.rl.batches import Source, source_of
from dlmctl.rl.srpo.contrast import Response, signals
from dlmctl.rl.srpo.credit import token_weights
from dlmctl.rl.srpo.evidence import MASKS, diffusion_signals, evidence_tokens
from dlmctl.rl.srpo.per_token import number_list
from dlmctl.rl.srpo.roles import OTHER, PERCEPTION, REASONING, token_roles
from dlmctl.settings.layout import Tags
from dlmctl.settings.srpo import Contrast, Credit


class BehaviorPolicy:
    """The policy that sampled the records, whichever round they are of."""

    def __init__(self, model: str | None, device: str, dtype: str, any_policy: bool) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._any_policy = any_policy
        self._name = model
        """What `policy` was loaded by."""
        self.policy: Policy | None = None
        """Loaded at the first record, and anew whenever the weights that sampled are others."""
        self._texts: tuple[Any, TokenTexts] | None = None

    def of(self, source: Source) -> Policy:
        """The policy of the records from a source.

        Raises:
            DataError: they do not say what they were sampled from, or the model has other weights
                by now.
        """
        name, wanted = self._model or source.model, source.revision
        if name is None:
            raise DataError(
                "the record does not say which model it was sampled from ('rollout.model'): "
                "give --model"
            )
        known = None if self._any_policy else wanted
        if self.policy is None or run_of(name) != run_of(self._name or name):
            self.policy = None  # so that there is memory for the next
            below = quantization_of(wanted or "")
            self.policy = load_policy(name, self._device, self._dtype, quantize=below)
        elif name != self._name or known not in (None, self.policy.revision):
            self.policy = reload_policy(self.policy, name, self._device, self._dtype)
        self._name = name
        if known not in (None, self.policy.revision):
            raise DataError(
                f"sampled from weights {wanted}, and {name} now has {self.policy.revision}: a "
                "weight is to be that of the policy that sampled (--any-policy takes it all the "
                "same)"
            )
        return self.policy

    def texts(self, policy: Policy) -> TokenTexts:
        """What the policy's tokens spell; the tokenizer does not change from round to round."""
        if self._texts is None or self._texts[0] is not policy.tokenizer:
            self._texts = policy.tokenizer, TokenTexts(policy.tokenizer)
        return self._texts[1]


def credit_passes(diffusion: bool) -> int:
    """Passes over a completion at most: with image, without, and without the perception; for
    diffusion, as many masks for each side of both contrasts."""
    return 4 * MASKS if diffusion else 3


def credited(
    records: Iterable[Record],
    sampler: BehaviorPolicy,
    contrast: Contrast,
    credit: Credit,
    tags: Tags,
    batch_size: int,
    on_error: OnError = "fail",
) -> Iterator[Record]:
    """Add `roles`, `signal`, `weights` and `credit` to records that have an `advantage`.

    Groups of about `batch_size` completions are in memory at a time, and those of them that were
    sampled from one policy are scored together. A malformed response has no roles and weights 1. If
    the advantage is 0 the weights change nothing: they are 1, unscored.
    """
    for batch in group_batches(records, batch_size):
        for source, rows in _by_source(batch):
            try:
                policy = sampler.of(source)
            except DataError as error:
                yield from _refused(rows, error.message, on_error)
                continue
            ready = _responses(rows, policy, sampler.texts(policy), tags, on_error)
            scored = [
                (record, response)
                for record, response in ready
                if response is not None and field(record, "advantage", (int, float)) != 0
            ]
            score = diffusion_signals if policy.diffusion else signals
            values = score(policy, [r for _, r in scored], contrast, batch_size) if scored else []
            by_record = {id(record): s for (record, _), s in zip(scored, values, strict=True)}
            for record, response in ready:
                signal = by_record.get(id(record))
                yield record if "error" in record else _weighted(record, response, signal, credit)


def _by_source(batch: Iterable[Record]) -> Iterator[tuple[Source, list[Record]]]:
    """Neighbours that were sampled from the same; records with an `error` go with those before."""
    rows: list[Record] = []
    source: Source | None = None
    for record in batch:
        record_source = source if "error" in record else source_of(record)
        if source is not None and record_source != source:
            yield source, rows
            rows = []
        rows.append(record)
        source = record_source
    yield source or Source(None, None), rows


def _refused(rows: Iterable[Record], message: str, on_error: OnError) -> Iterator[Record]:
    for record in rows:
        fault = DataError(message, record.where)
        yield from [record] if "error" in record else faulty(record, fault, on_error)


def _responses(
    rows: Iterable[Record], policy: Policy, texts: TokenTexts, tags: Tags, on_error: OnError
) -> list[tuple[Record, Response | None]]:
    """Each record with its response; None if it is malformed, or the record has an `error`."""
    ready: list[tuple[Record, Response | None]] = []
    for record in rows:
        if "error" in record:
            ready.append((record, None))
            continue
        try:
            ready.append((record, _response(record, policy, texts, tags)))
        except DataError as error:
            error.where = error.where or record.where
            ready += [(marked, None) for marked in faulty(record, error, on_error)]
    return ready


def _response(record: Record, policy: Policy, texts: TokenTexts, tags: Tags) -> Response | None:
    """The record as a response whose tokens have roles; None where it is malformed."""
    if not (record.get("tokens") or {}).get("completion"):
        raise DataError(
            "the record has no ids of its completion ('tokens.completion'), and text is not "
            "tokenized again; 'dlmctl rollout' writes them",
            record.where,
        )
    ids = policy.encode_completion(record)
    roles = token_roles(texts.row(ids), tags)
    if roles is None:
        return None
    prompt = policy.encode(record)
    return Response(
        prompt,
        ids,
        policy.pictures(record),
        torch.tensor(roles),
        field(record, "id", (str, int)),
        record.get("sample", 0),
        evidence_tokens(texts.row(prompt), record.get("evidence")),
        policy.vision.without_images(prompt) if policy.vision else prompt,
        _recorded(record, policy, len(ids)),
    )


def _recorded(record: Record, policy: Policy, length: int) -> torch.Tensor | None:
    """Log-probabilities of sampling, if they are of these weights and good for a difference.

    In half precision the noise between sampling with a cache and scoring would pass for a signal.
    """
    place = object_field(record, "rollout")
    exact = place.get("dtype") in ("float32", "float64")
    if not exact or place.get("revision") != policy.revision:
        return None
    return number_list(place.get("log_probs"), length)


def _weighted(
    record: Record, response: Response | None, signal: torch.Tensor | None, credit: Credit
) -> Record:
    done = Record(record)
    done.where = record.where
    length = len(record["tokens"]["completion"])
    roles = torch.full((length,), OTHER) if response is None else response.roles
    done["roles"] = roles.tolist()
    values = torch.zeros(length, dtype=torch.float64) if signal is None else signal
    seen = roles if signal is not None else torch.full((length,), OTHER)
    weighted = token_weights(values, seen, float(record["advantage"]), credit)
    done["signal"] = values.tolist()
    done["weights"] = weighted.weights.tolist()
    done["credit"] = {
        "format_ok": response is not None,
        "scored": signal is not None,
        "perception": _means(roles == PERCEPTION, values, weighted.weights),
        "reasoning": _means(roles == REASONING, values, weighted.weights),
        "baseline": weighted.baseline,
        "clipped_low": weighted.clipped_low,
        "clipped_high": weighted.clipped_high,
    }
    return done


def _means(chosen: torch.Tensor, signal: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    if not chosen.any():
        return {"tokens": 0, "signal": None, "weight": None}
    return {
        "tokens": int(chosen.sum()),
        "signal": float(signal[chosen].mean()),
        "weight": float(weights[chosen].mean()),
    }
