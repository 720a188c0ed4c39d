"""Measures of reconstruction against their definitions on whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.measures import GROUPS, Reconstruction, average_max_cosines
from dlmctl.sae.topk import Codes, TopKSae


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


def test_norms_and_activations_are_those_of_the_definitions() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator) + 1
    made = 0.7 * x + 0.2 * torch.randn(40, 5, dtype=torch.float64, generator=generator)
    values = torch.rand(40, 2, generator=generator)
    codes = Codes(values, torch.randint(6, (40, 2), generator=generator))
    row, size, out = _measured(x, made, codes, 9), x.norm(dim=1), made.norm(dim=1)
    assert row["mse"] == pytest.approx(float((x - made).square().sum(dim=1).mean()))
    assert row["l2_norm_in"] == pytest.approx(float(size.mean()))
    assert row["l2_norm_out"] == pytest.approx(float(out.mean()))
    assert row["l2_ratio"] == pytest.approx(float((out / size).mean()))
    bias = out.square().mean() / (x * made).sum(dim=1).mean()
    assert row["relative_reconstruction_bias"] == pytest.approx(float(bias))
    assert row["l1"] == pytest.approx(float(values.double().sum(dim=1).mean()))
    x[3] = 0.0  # has no ratio
    others = torch.arange(40) != 3
    wanted = (made.norm(dim=1) / x.norm(dim=1))[others].mean()
    assert _measured(x, made, codes, 9)["l2_ratio"] == pytest.approx(float(wanted))


def test_the_bias_of_a_reconstruction_that_is_too_short_is_its_length() -> None:
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    row = _of(x, 0.5 * x)
    assert row["relative_reconstruction_bias"] == pytest.approx(0.5)
    assert row["l2_ratio"] == pytest.approx(0.5)
    assert row["l2_ratio_se"] == pytest.approx(0.0, abs=1e-12)


def test_errors_are_over_documents() -> None:
    """Each document is off by a number of its own, so that its tokens all say the same."""
    generator = torch.Generator().manual_seed(7)
    numbers = torch.arange(6)
    row = torch.arange(60) % 6
    x = torch.randn(60, 3, dtype=torch.float64, generator=generator) + 2
    made = x + torch.randn(6, 1, dtype=torch.float64, generator=generator)[row]
    codes = Codes(torch.ones(60, 1), torch.zeros(60, 1, dtype=torch.int64))
    measures = Reconstruction(3, 4)
    measures.add(x, made, codes, row, numbers)
    found, e = measures.row(), made - x

    def error(above: Tensor, below: Tensor) -> float:
        d, n = (torch.stack([part[row == i].sum() for i in range(6)]) for part in (above, below))
        squares = (d - d.sum() / n.sum() * n).square()
        return float((squares.sum() * 6 / 5).sqrt() / n.sum().abs())

    cosine, one = functional.cosine_similarity(x, made), torch.ones(60, dtype=torch.float64)
    spread = (x - x.mean(dim=0)).square().sum(dim=1)
    assert found["cos_se"] == pytest.approx(error(cosine, one))
    assert found["nmse_se"] == pytest.approx(error(e.square().sum(1), x.square().sum(1)))
    assert found["fve_se"] == pytest.approx(error(e.square().sum(1), spread))
    assert found["fve_var_se"] == pytest.approx(error((e - e.mean(0)).square().sum(1), spread))
    assert found["fve_normal_se"] == pytest.approx(found["fve_se"])
    bias = found["relative_reconstruction_bias_se"]
    assert bias == pytest.approx(error(made.square().sum(1), (x * made).sum(1)))


def test_more_documents_than_groups_share_them() -> None:
    """The number stays what it is; its error is that of the groups, which are as independent."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(3 * GROUPS, 4, dtype=torch.float64, generator=generator)
    made = x + 0.3 * torch.randn(3 * GROUPS, 4, dtype=torch.float64, generator=generator)
    codes = Codes(torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64))
    measures, alone = Reconstruction(4, 4), torch.arange(len(x))
    measures.add(x, made, codes, alone, alone)
    row, e = measures.row(), (made - x).square().sum(dim=1)
    spread = (x - x.mean(dim=0)).square().sum(dim=1)
    assert row["fve"] == pytest.approx(float(1 - e.sum() / spread.sum()))
    exact = (e - e.sum() / spread.sum() * spread).square().sum().sqrt() / spread.sum()
    assert row["fve_se"] == pytest.approx(float(exact), rel=0.15)


def test_latents_are_counted_by_how_often_they_are_active() -> None:
    """One on all of 400 tokens, one on 41, one on 40, one on 5, one on 4, and one on none."""
    often = [400, 41, 40, 5, 4, 0]
    values = torch.stack([(torch.arange(400) < count).float() for count in often], dim=1)
    codes = Codes(values, torch.arange(6).expand(400, -1))
    row = _measured(torch.randn(400, 3), torch.randn(400, 3), codes, 6)
    assert row["dead"] == pytest.approx(1 / 6)
    assert row["freq_over_10_percent"] == pytest.approx(2 / 6)  # 40 of 400 is not above
    assert row["freq_over_1_percent"] == pytest.approx(4 / 6)
    edges, counts = row["density"]["edges"], row["density"]["counts"]  # type: ignore[index]
    assert len(edges) == len(counts) + 1
    filled = {edges[place]: count for place, count in enumerate(counts) if count}
    assert filled == {0.01: 2, 0.1: 2, 0.31623: 1}


def test_the_nearest_latent_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlmctl.sae.measures.ROWS", 3)
    sae, generator = TopKSae(4, 8, 2), torch.Generator().manual_seed(9)
    for parameter in sae.parameters():
        parameter.data.normal_(generator=generator)
    found = average_max_cosines(sae)
    for name, rows in (("decoder", sae.W_dec.detach()), ("encoder", sae.W_enc.detach().T)):
        cosines = functional.cosine_similarity(rows[:, None], rows[None], dim=2)
        wanted = cosines.fill_diagonal_(-1).amax(dim=1).mean()
        assert found[f"average_max_{name}_cosine_sim"] == pytest.approx(float(wanted), abs=1e-6)
    assert average_max_cosines(TopKSae(4, 1, 1))["average_max_decoder_cosine_sim"] is None


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
