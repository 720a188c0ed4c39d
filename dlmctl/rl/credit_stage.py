"""The second half of `advantage --algo srpo`: a weight for every token of every completion.

Weights are made here rather than in `update`, so that they depend on no batch of a trainer, and can
be looked at. They are those of the policy that sampled the completion; in a training loop its
checkpoint is loaded again whenever the records come from a newer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.models.policy import Policy
from dlmctl.models.token_text import TokenTexts
from dlmctl.records.errors import DataError
from dlmctl.records.groups import group_batches
from dlmctl.records.jsonl import OnError, Record, faulty, field, object_field
from dlmctl.rl.contrast import Contrast, Response, signals
from dlmctl.rl.credit import Credit, token_weights
from dlmctl.rl.evidence import MASKS, diffusion_signals, evidence_tokens
from dlmctl.rl.per_token import number_list
from dlmctl.rl.roles import OTHER, PERCEPTION, REASONING, token_roles
from dlmctl.tasks.layout import Tags


class Sampler:
    """The policy that sampled the records, whichever round they are of."""

    def __init__(self, model: str | None, device: str, dtype: str, any_policy: bool) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._any_policy = any_policy
        self.policy: Policy | None = None
        """Loaded at the first record, and anew whenever the weights that sampled are others."""
        self._texts: TokenTexts | None = None

    def of(self, record: Record) -> Policy:
        """The policy of a record.

        Raises:
            DataError: the record does not say what it was sampled from, or the model has other
                weights by now.
        """
        place = object_field(record, "rollout")
        name, wanted = self._model or place.get("model"), place.get("revision")
        if name is None:
            raise DataError(
                "the record does not say which model it was sampled from ('rollout.model'): "
                "give --model",
                record.where,
            )
        if self.policy is None:
            self.policy = load_policy(name, self._device, self._dtype)
        elif not self._any_policy and wanted != self.policy.revision:
            self.policy = reload_policy(self.policy, name, self._device, self._dtype)
        if not self._any_policy and wanted is not None and wanted != self.policy.revision:
            raise DataError(
                f"sampled from weights {wanted}, and {name} now has {self.policy.revision}: a "
                "weight is to be that of the policy that sampled (--any-policy takes it all the "
                "same)",
                record.where,
            )
        return self.policy

    def texts(self, policy: Policy) -> TokenTexts:
        """What the policy's tokens spell; the tokenizer does not change from round to round."""
        if self._texts is None:
            self._texts = TokenTexts(policy.tokenizer)
        return self._texts


def credit_passes(diffusion: bool) -> int:
    """Passes over a completion at most: with image, without, and without the perception; for
    diffusion, as many masks for each side of both contrasts."""
    return 4 * MASKS if diffusion else 3


def credited(
    records: Iterable[Record],
    sampler: Sampler,
    contrast: Contrast,
    credit: Credit,
    tags: Tags,
    batch_size: int,
    on_error: OnError = "fail",
) -> Iterator[Record]:
    """Add `roles`, `signal`, `weights` and `credit` to records that bear an `advantage`.

    Groups of about `batch_size` completions are in memory at a time. A malformed response has no
    roles and weights 1. Where the advantage is 0 the weights change nothing: they are 1, unscored.
    """
    for batch in group_batches(records, batch_size):
        if not batch:
            continue
        policy = sampler.of(batch[0][0])
        texts = sampler.texts(policy)
        ready: list[tuple[Record, Response | None]] = []
        for record in chain.from_iterable(batch):
            try:
                ready.append((record, _response(record, policy, texts, tags)))
            except DataError as error:
                error.where = error.where or record.where
                ready += [(marked, None) for marked in faulty(record, error, on_error)]
        scored = [
            (record, response)
            for record, response in ready
            if response is not None and field(record, "advantage", (int, float)) != 0
        ]
        score = diffusion_signals if policy.diffusion else signals
        made = score(policy, [r for _, r in scored], contrast, batch_size) if scored else []
        signal = {id(record): s for (record, _), s in zip(scored, made, strict=True)}
        for record, response in ready:
            marked = "error" in record
            yield record if marked else _weighted(record, response, signal.get(id(record)), credit)


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
