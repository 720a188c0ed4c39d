"""The order that completions were decoded in, where an objective depends on it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from dlmctl.diffusion.scoring import decoding_order
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, object_field


def check_left_to_right(records: Iterable[Record], policy: Policy) -> None:
    """Refuse completions that were not sampled one token after the other.

    What follows the first token that ends a completion may be in any order. Completions of other
    programs, which have no order, are taken.

    Raises:
        DataError: `rollout.order` is another, or is none at all.
    """
    for record in records:
        if object_field(record, "rollout").get("order") is None:
            continue
        ids = policy.encode_completion(record)
        steps = decoding_order(record, len(ids))[: policy.length(ids)]
        if any(step >= following for step, following in pairwise(steps)):
            raise DataError(
                "not sampled from left to right, one token a step, as this algorithm scores it: "
                "sample with 'dlmctl rollout --block-length 1'",
                record.where,
            )
