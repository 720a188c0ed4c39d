"""The stage `sae-order`: the same prompts with the same noise, sampled in several orders.

Prompts are taken a window at a time, and each window is sampled in every order, so that memory does
not grow with the stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import OnError, Record, each, field
from dlmctl.sae.order.feature_watch import Dictionary, check_watchable
from dlmctl.sae.order.signals import auroc
from dlmctl.sae.order.watch import SIGNALS, OrderWatch
from dlmctl.settings.sampler import Remasking

WINDOW = 4
"""Batches of completions of an order, before the next order has its turn."""

TOP = 20
"""Features of a dictionary that are named."""

Row = dict[str, Any]


class OrderStudy:
    """Samples in several orders, and says in the end what differs between them.

    Raises:
        UsageError: the model is autoregressive, or the settings leave out parts of passes.
    """

    def __init__(
        self,
        policy: Policy,
        dictionaries: Sequence[Dictionary],
        settings: SamplerConfig,
        orders: Sequence[Remasking],
        truth: str | None = None,
    ) -> None:
        check_watchable(policy, settings, "sae-order")
        self.policy, self.dictionaries, self.truth = policy, dictionaries, truth
        self.settings = {order: dataclasses.replace(settings, remasking=order) for order in orders}
        self.watches = {order: OrderWatch(policy, dictionaries) for order in orders}
        self._means = {order: [_Means() for _ in dictionaries] for order in orders}

    def run(
        self,
        records: Iterable[Record],
        samples: int,
        seed: int,
        batch_size: int,
        on_error: OnError = "fail",
    ) -> Iterator[Record]:
        """A record for each completion, window by window and in a window order by order."""
        ready = each(records, self._prepare, on_error)
        while window := list(islice(ready, -(-WINDOW * batch_size // samples))):
            sound = [record for record in window if "error" not in record]
            yield from (record for record in window if "error" in record)
            for order, watch in self.watches.items():
                made = rollout(
                    sound, self.policy, self.settings[order], samples, seed, batch_size, watch=watch
                )
                for number, record in enumerate(watch.around(made)):
                    reports = watch.reports.pop(number)
                    for means, report in zip(self._means[order], reports, strict=True):
                        means.add(report)
                    record["features"] = reports
                    yield record

    def _prepare(self, record: Record) -> Record:
        ready = Record(record)
        ready.where = record.where
        field(record, "id", (str, int), "'dlmctl prompts' writes it")
        tokens = {**(record.get("tokens") or {}), "prompt": self.policy.encode(record)}
        truth = None if self.truth is None else record.get(self.truth)
        if isinstance(truth, str):
            truth = self.policy.encode_text(truth)
        if truth is not None and not _are_ids(truth):
            raise DataError(f"field '{self.truth}' is neither text nor a list of token ids or null")
        ready["tokens"] = {**tokens, "truth": truth}
        return ready

    def summary(self) -> Iterator[Row]:
        """Means of each order, features that differ from the first order's, and signals."""
        yield from self._mean_rows()
        yield from self._feature_rows()
        if self.truth is not None:
            yield from self._signal_rows()

    def _mean_rows(self) -> Iterator[Row]:
        for order, means in self._means.items():
            for dictionary, mean in zip(self.dictionaries, means, strict=True):
                start = {"row": "mean", "order": order, **dictionary.note()}
                yield start | {"completions": mean.completions} | mean.values()

    def _feature_rows(self) -> Iterator[Row]:
        [reference, *others] = self.watches
        for order in others:
            for number, dictionary in enumerate(self.dictionaries):
                counts = [self.watches[name].counts[number] for name in (reference, order)]
                scores = counts[0].scores(counts[1])
                best = scores.sort(descending=True, stable=True).indices[:TOP].tolist()
                for feature in best:
                    yield {
                        "row": "feature",
                        "order": order,
                        "reference": reference,
                        **dictionary.note(),
                        "feature": feature,
                        "score": float(scores[feature]),
                    }

    def _signal_rows(self) -> Iterator[Row]:
        for order, watch in self.watches.items():
            for dictionary, pool in zip(self.dictionaries, watch.pools, strict=True):
                found = pool.columns()
                if not found:
                    continue
                right = found["right"]
                for signal in SIGNALS:
                    yield {
                        "row": "signal",
                        "order": order,
                        **dictionary.note(),
                        "signal": signal,
                        "auroc": auroc(found[signal], right),
                        "auroc_step": auroc(found[signal], right, found["step"]),
                        "auroc_choice": auroc(found[signal], right, found["unit"]),
                        "proposals": pool.seen,
                        "used": len(right),
                        "right": float(right.double().mean()),
                    }


class _Means:
    """Means of the numbers of reports, and of each bin of their curves."""

    def __init__(self) -> None:
        self.completions = 0
        self._sums: dict[str, list[list[float]]] = {}
        self._curves: dict[str, bool] = {}

    def add(self, report: Mapping[str, Any]) -> None:
        self.completions += 1
        for name, value in report.items():
            if name in ("sae", "layer"):
                continue
            self._curves[name] = isinstance(value, list)
            values = value if isinstance(value, list) else [value]
            sums = self._sums.setdefault(name, [[0.0, 0] for _ in values])
            for entry, number in zip(sums, values, strict=True):
                if number is not None:
                    entry[0] += number
                    entry[1] += 1

    def values(self) -> Row:
        means = {
            name: [total / count if count else None for total, count in sums]
            for name, sums in self._sums.items()
        }
        return {name: mean if self._curves[name] else mean[0] for name, mean in means.items()}


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        number is None or (isinstance(number, int) and not isinstance(number, bool))
        for number in value
    )
