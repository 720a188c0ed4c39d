"""Operations on tensors of two devices, and whether the mirrored device refuses each, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import mirror  # before torch
import torch

from dlmctl.diffusion.elbo import Example
from dlmctl.diffusion.masks import draw_masks
from dlmctl.rl.gradient import elbo_coefficients

HERE, NUMBER = torch.arange(4.0), torch.tensor(2.0)
ONES = torch.ones(4, dtype=torch.long)
Operation = Callable[[torch.Tensor], object]

REFUSED: dict[str, Operation] = {
    "a sum": lambda x: x + HERE,
    "a number of the device and a tensor of the host": lambda x: x[0] + HERE,
    "a product of matrices": lambda x: x @ HERE,
    "joined": lambda x: torch.cat([x, HERE]),
    "joined numbers": lambda x: torch.stack([x[0], NUMBER]),
    "compared": lambda x: torch.equal(x, HERE),
    "one of two": lambda x: torch.where(x > 1, x, HERE),
    "places of the device in a tensor of the host": lambda x: HERE[x.long()],
    "gathered": lambda x: x.gather(0, ONES),
    "values put in place": lambda x: x.index_put_((ONES,), HERE),
    "added to a number of the host": lambda x: NUMBER.clone().add_(x[0]),
    "searched for": lambda x: torch.searchsorted(x, NUMBER),
    "a generator of the host": lambda x: x.uniform_(generator=torch.Generator()),
    "noise of a generator of the host": lambda x: torch.rand(
        4, generator=torch.Generator(), device=x.device
    ),
    "an array": lambda x: x.numpy(),
    "weights of masks": lambda x: elbo_coefficients([EXAMPLE] * 4, x),
}
ALLOWED: dict[str, Operation] = {
    "a number of the host": lambda x: x * NUMBER,
    "places of the host in a tensor of the device": lambda x: x[ONES],
    "a number put in place": lambda x: x.clone().index_put_((ONES,), NUMBER),
    "a copy to the device": lambda x: torch.empty_like(x).copy_(HERE),
    "numbers of the device": lambda x: torch.tensor([x[1], x[2]]),
}
EXAMPLE = Example([3], [4, 5], draw_masks("complementary", 4, torch.ones(2).bool(), ("a", 0), 0))


def refused(operation: Operation, x: torch.Tensor) -> str:
    """What the device says of an operation; nothing if it computes it."""
    try:
        operation(x)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


def agrees(operation: Operation, x: torch.Tensor) -> bool:
    result, expected = operation(x), operation(HERE)
    assert isinstance(result, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    return result.cpu().tolist() == expected.tolist()


def main() -> None:
    report: dict[str, dict[str, object]] = {"refused": {}, "allowed": {}, "noted": {}}
    for name, operation in REFUSED.items():
        assert not refused(operation, HERE.clone()), name
        with mirror.mirrored() as ledger:
            report["refused"][name] = refused(operation, HERE.to("cuda"))
        report["noted"][name] = ledger.mixes
    with mirror.mirrored():
        for name, operation in ALLOWED.items():
            report["allowed"][name] = agrees(operation, HERE.to("cuda"))
    print(json.dumps(report))


main()
