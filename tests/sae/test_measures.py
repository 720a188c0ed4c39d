"""Measures of reconstruction against their definitions on whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.measures import Reconstruction
from dlmctl.sae.topk import Codes


def _measured(x: Tensor, made: Tensor, codes: Codes, latents: int) -> dict[str, float]:
    """In batches of two documents, the tokens of which alternate."""
    measures = Reconstruction(x.shape[1], latents)
    for part in range(0, len(x), 7):
        rows, numbers = slice(part, part + 7), torch.tensor([part, part + 1])
        code = Codes(codes.values[rows], codes.indices[rows])
        row = torch.arange(len(x[rows])) % 2
        measures.add(x[rows], made[rows], code, row, numbers)
    return measures.row()


def test_measures_are_those_of_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator) + 2
    made = x + 0.3 * torch.randn(40, 5, dtype=torch.float64, generator=generator) + 0.1
    values = torch.rand(40, 2, generator=generator) * (torch.rand(40, 2, generator=generator) > 0.4)
    codes = Codes(values, torch.randint(6, (40, 2), generator=generator))
    row, e = _measured(x, made, codes, 9), made - x
    spread = (x - x.mean(dim=0)).square()
    assert row["tokens"] == 40
    assert row["fve"] == pytest.approx(1 - float(e.square().sum() / spread.sum()))
    assert row["fve_var"] == pytest.approx(1 - float(e.var(dim=0).sum() / x.var(dim=0).sum()))
    assert row["fve_dim"] == pytest.approx(1 - float((e.var(dim=0) / x.var(dim=0)).mean()))
    assert row["nmse"] == pytest.approx(float(e.square().sum() / x.square().sum()))
    assert row["cos"] == pytest.approx(float(functional.cosine_similarity(x, made).mean()))
    assert row["l0"] == pytest.approx(float((values > 0).sum(dim=1).double().mean()))
    used = set(codes.indices[values > 0].tolist())
    assert row["dead"] == pytest.approx((9 - len(used)) / 9)


def test_tokens_of_massive_norm_are_left_out_of_one_figure() -> None:
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = torch.zeros_like(x)  # explains nothing
    x[20] = made[20] = 1e4  # but the one token that holds nearly all of the variance
    row = _measured(x, made, Codes(torch.zeros(50, 2), torch.zeros(50, 2, dtype=torch.int64)), 9)
    assert row["fve"] > 0.99
    assert row["fve_normal"] < 0.05
    assert row["massive"] == 1


def _of(x: Tensor, made: Tensor) -> dict[str, float]:
    codes = Codes(torch.zeros(len(x), 2), torch.zeros(len(x), 2, dtype=torch.int64))
    return _measured(x, made, codes, 9)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_dimension_without_variance_is_left_out(noise: float) -> None:
    """One that is constant, or but for rounding to float32."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 4, dtype=torch.float64, generator=generator)
    x[:, 1] = 1000 * (1.7 + noise * torch.randn(400, dtype=torch.float64, generator=generator))
    made = x + 0.1 * torch.randn(400, 4, dtype=torch.float64, generator=generator)
    row, others = _of(x, made), [0, 2, 3]
    assert row["constant"] == 1
    assert row["fve_dim"] == pytest.approx(_of(x[:, others], made[:, others])["fve_dim"])
    assert _of(x[:, others], made[:, others])["constant"] == 0


def test_a_large_mean_hides_no_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    made = x + 0.5 * torch.randn(200, 3, dtype=torch.float64, generator=generator)
    far = torch.tensor([1e4, 0.0, -1e5])
    row, shifted = _of(x, made), _of(x + far, made + far)
    for name in ("fve", "fve_var", "fve_dim"):
        assert shifted[name] == pytest.approx(row[name], rel=1e-9)
    assert shifted["constant"] == 0


def test_what_does_not_vary_has_no_variance_to_explain() -> None:
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(4))
    for count in (1, 50):
        same = x.expand(count, -1)
        row = _of(same, same + 0.5)
        assert [row[name] for name in ("fve", "fve_var", "fve_dim", "fve_normal")] == [None] * 4
        assert row["constant"] == 4
        assert row["nmse"] == pytest.approx(1.0 / float(x.square().sum()))
    assert _of(torch.zeros(3, 4), torch.ones(3, 4))["nmse"] is None
