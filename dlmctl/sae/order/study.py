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
from dlmctl.report.auroc import stratified_auroc
from dlmctl.sae.order.feature_change import BINS
from dlmctl.sae.order.probing import Proposals, probe_rows
from dlmctl.sae.order.recording import MEASURES, SIGNALS, OrderRecorder
from dlmctl.sae.order.solving import solving_rows
from dlmctl.sae.order.tracking import check_trackable
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer
from dlmctl.settings.sampler import Remasking

WINDOW = 4
"""Batches of completions of an order before the next order has its turn."""

TOP = 20
"""Features of an autoencoder that are named."""

Row = dict[str, Any]


class OrderStudy:
    """Samples in several orders, and summarizes what differs between them.

    Raises:
        UsageError: the model is autoregressive, or the sampler leaves out parts of passes.
    """

    def __init__(
        self,
        policy: Policy,
        saes: Sequence[SaeAtLayer],
        sampler: SamplerConfig,
        orders: Sequence[Remasking],
        truth: str | None = None,
        probes: int | None = None,
    ) -> None:
        """
        Args:
            truth: field of a record with the right completion, text or token ids.
            probes: how many proposals of an order are kept for probes; None: no probes.
        """
        check_trackable(policy, sampler, "sae-order")
        self.policy, self.saes, self.truth = policy, saes, truth
        self.seed = 0
        self.samplers = {order: dataclasses.replace(sampler, remasking=order) for order in orders}
        self.recorders = {order: OrderRecorder(policy, saes, probes) for order in orders}
        self._means = {order: [_Means() for _ in saes] for order in orders}

    def run(
        self,
        records: Iterable[Record],
        samples: int,
        seed: int,
        batch_size: int,
        on_error: OnError = "fail",
    ) -> Iterator[Record]:
        """A record for each completion: window by window and within a window order by order."""
        self.seed = seed
        ready = each(records, self._prepare, on_error)
        while window := list(islice(ready, -(-WINDOW * batch_size // samples))):
            usable = [record for record in window if "error" not in record]
            yield from (record for record in window if "error" in record)
            for order, recorder in self.recorders.items():
                completions = rollout(
                    usable,
                    self.policy,
                    self.samplers[order],
                    samples,
                    seed,
                    batch_size,
                    callback=recorder,
                )
                for number, record in enumerate(recorder.around(completions)):
                    record["features"] = recorder.reports.pop(number)
                    for means, report in zip(self._means[order], record["features"], strict=True):
                        means.add(report)
                    yield record

    def _prepare(self, record: Record) -> Record:
        """The record with token ids of its prompt and of the right completion."""
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
        """Means of each order and their curves, features that differ from the first order's; and
        with a truth signals, what goes with solving, and probes."""
        # 1. Means.
        for order, means in self._means.items():
            for sae, mean in zip(self.saes, means, strict=True):
                start = {"order": order, **sae.fields()}
                values = mean.values()
                yield {"row": "mean"} | start | {"completions": mean.completions} | values
                for row in turnover(values):
                    yield {"row": "turnover"} | start | row
        # 2. Features.
        [reference, *others] = self.recorders
        for order in others:
            for number, sae in enumerate(self.saes):
                base, counts = (self.recorders[o].counts[number] for o in (reference, order))
                scores = base.scores(counts)
                for feature in scores.sort(descending=True, stable=True).indices[:TOP].tolist():
                    yield {
                        "row": "feature",
                        "order": order,
                        "reference": reference,
                        **sae.fields(),
                        "feature": feature,
                        "score": float(scores[feature]),
                    }
        # 3. Signals.
        for order, recorder in self.recorders.items() if self.truth is not None else ():
            for sae, pool in zip(self.saes, recorder.pools, strict=True):
                columns = pool.columns()
                for signal in SIGNALS if columns else ():
                    value, right = columns[signal], columns["right"]
                    yield {
                        "row": "signal",
                        "order": order,
                        **sae.fields(),
                        "signal": signal,
                        "auroc": stratified_auroc(value, right),
                        "auroc_step": stratified_auroc(value, right, columns["step"]),
                        "auroc_choice": stratified_auroc(value, right, columns["unit"]),
                        "proposals": pool.seen,
                        "used": len(right),
                        "right": float(right.double().mean()),
                    }
        # 4. What goes with solving, and probes.
        for order, recorder in self.recorders.items() if self.truth is not None else ():
            for number, sae in enumerate(self.saes):
                start = {"order": order, **sae.fields()}
                columns = recorder.completed[number].columns()
                for row in solving_rows(columns, MEASURES, self.seed) if columns else ():
                    yield {"row": "solving"} | start | row
                if recorder.probed is None:
                    continue
                columns = recorder.probed[number].columns()
                if columns:
                    proposals = Proposals(**{name: columns[name] for name in Proposals._fields})
                    for row in probe_rows(proposals, sae.sae, self.seed):
                        yield {"row": "probe"} | start | row


def turnover(means: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of the share decided (the middle of its bin) and 1 - similarity of features there."""
    curves = {kind: means.get(f"{kind}_by_progress") for kind in ("masked", "decided")}
    for bin_ in range(BINS) if all(curves.values()) else ():
        values = {kind: curve[bin_] for kind, curve in curves.items() if curve is not None}
        changed = {k: None if value is None else 1 - value for k, value in values.items()}
        yield {"progress": (bin_ + 0.5) / BINS} | changed


class _Means:
    """Running means of the numbers in reports, and of each bin of their curves."""

    def __init__(self) -> None:
        self.completions = 0
        self._sums: dict[str, list[list[float]]] = {}
        """Total and count of each bin; a plain number has one bin."""
        self._curves: set[str] = set()

    def add(self, report: Mapping[str, Any]) -> None:
        self.completions += 1
        for name, value in report.items():
            if name in ("sae", "layer"):
                continue
            values = value if isinstance(value, list) else [value]
            if values is value:
                self._curves.add(name)
            for entry, number in zip(
                self._sums.setdefault(name, [[0.0, 0] for _ in values]), values, strict=True
            ):
                if number is not None:
                    entry[0] += number
                    entry[1] += 1

    def values(self) -> Row:
        means = {
            name: [total / count if count else None for total, count in sums]
            for name, sums in self._sums.items()
        }
        return {name: mean if name in self._curves else mean[0] for name, mean in means.items()}


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        number is None or (isinstance(number, int) and not isinstance(number, bool))
        for number in value
    )
