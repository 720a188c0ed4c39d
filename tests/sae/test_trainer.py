"""One autoencoder under training: invariants, scale, schedule, resuming."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.records.errors import UsageError
from dlmctl.sae.topk import JumpReluSae, TopKSae
from dlmctl.sae.training.gradient import choose
from dlmctl.sae.training.trainer import (
    SaeTrainer,
    fit,
    geometric_median,
    rate_at,
    remove_parallel,
)
from dlmctl.settings.sae import SaeKind, SaeRecipe

D = 8


def _planted(count: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Sums of 2 of 12 fixed directions, around a point."""
    generator = torch.Generator().manual_seed(99)
    directions = functional.normalize(torch.randn(12, D, generator=generator), dim=1)
    generator.manual_seed(seed)
    chosen = torch.rand(count, 12, generator=generator).topk(2, dim=1).indices
    sizes = 1 + torch.rand(count, 2, generator=generator)
    return scale * ((sizes[..., None] * directions[chosen]).sum(dim=1) + 3.0)


def _trainer(seed: int = 0, **changes: object) -> SaeTrainer:
    settings: dict[str, object] = {
        "latents": 32,
        "batch_size": 64,
        "tokens": 64 * 200,
        "rate": 3e-3,
        "dead_after": 10_000_000,
    }
    if changes.get("kind") == "matryoshka":
        settings["prefixes"] = "1/4,1/2"
    recipe = SaeRecipe(**{**settings, **changes})  # type: ignore[arg-type]
    trainer = SaeTrainer(recipe, D, 2, seed, "cpu")
    trainer.begin(_planted(500))
    return trainer


def _run(trainer: SaeTrainer, steps: int, scale: float = 1.0) -> list[dict[str, float]]:
    first = trainer.step
    return [trainer.train_step(_planted(64, first + n + 1, scale)) for n in range(steps)]


def test_it_explains_what_was_planted() -> None:
    trainer = _trainer(tokens=64 * 1500)
    metrics = _run(trainer, 1500)
    assert metrics[0]["fve"] < 0.7
    assert metrics[-1]["fve"] > 0.9
    assert metrics[-1]["l0"] <= 2


@functools.cache
def _trained(kind: str) -> TopKSae:
    trainer = _trainer(kind=kind, tokens=64 * 400)
    _run(trainer, 400)
    return trainer.saved({}).sae.requires_grad_(False)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_with_a_threshold_other_activations_are_explained_too(kind: str) -> None:
    sae, x = _trained(kind), _planted(2000, 12345)
    assert type(sae) is JumpReluSae
    assert (fit(x, sae(x) - x)["fve"] or 0) > 0.8
    counts = (sae.encode(x).values > 0).sum(dim=1).double()
    assert float(counts.mean()) == pytest.approx(2.0, abs=0.3)
    assert float(counts.std()) > 0.1  # as many as each needs


def test_the_first_prefix_learns_to_explain_by_itself() -> None:
    """8 latents that are trained for it explain more than the first 8 of others."""

    def explained(kind: str) -> float:
        sae, x = _trained(kind), _planted(2000, 12345)
        dense = sae.encode(x).dense(32)[:, :8]
        return fit(x, dense @ sae.W_dec[:8] + sae.b_dec - x)["fve"] or 0.0

    assert explained("matryoshka") > explained("batchtopk") + 0.1


def test_the_threshold_is_the_running_mean_of_the_smallest_active_latent() -> None:
    trainer = _trainer(kind="batchtopk")  # 200 steps: it begins after 20, with beta 0.95
    wanted = 0.0
    for step in range(60):
        x = _planted(64, step + 1)
        sae, scaled = trainer.sae, x / trainer.scale
        with torch.no_grad():
            pre = functional.linear(scaled - sae.centre, sae.encoder, sae.bias)
            largest = pre.flatten().sort(descending=True).values[: 64 * 2]
        lowest = float(largest[largest > 0][-1])
        wanted = 0.95 * wanted + 0.05 * lowest if step > 20 else lowest
        row = trainer.train_step(x)
        assert float(trainer.threshold) == pytest.approx(wanted, rel=1e-5)
        with torch.no_grad():
            above = (pre > trainer.threshold).sum(dim=1).double().mean()
        assert row["l0"] == pytest.approx(float(above))
    saved = trainer.saved({}).sae
    assert isinstance(saved, JumpReluSae)
    torch.testing.assert_close(saved.threshold, (trainer.threshold * trainer.scale).expand(32))


def test_at_the_published_length_it_begins_at_step_1000_with_beta_0999() -> None:
    trainer = _trainer(kind="batchtopk", tokens=64 * 20_000)
    codes = choose(torch.tensor([[3.0, 1.0, -1.0]]), 2, "batchtopk")
    for step, wanted in [(5, 1.0), (1000, 1.0), (1001, 0.999 * 4.0 + 0.001)]:
        trainer.step, trainer.threshold = step, torch.tensor(4.0)
        trainer._track_threshold(codes)
        assert float(trainer.threshold) == pytest.approx(wanted)
    trainer._track_threshold(choose(torch.full((1, 3), -1.0), 2, "batchtopk"))  # none is active
    assert float(trainer.threshold) == pytest.approx(wanted)


def test_decoder_rows_keep_norm_one_and_gradients_are_tangent() -> None:
    trainer = _trainer()
    _run(trainer, 20)
    torch.testing.assert_close(trainer.sae.decoder.norm(dim=1), torch.ones(32))
    trainer.sae.decoder.grad = torch.randn(32, D)
    remove_parallel(trainer.sae)
    along = (trainer.sae.decoder.grad * trainer.sae.decoder).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["topk", "matryoshka"])
def test_activations_of_another_scale_give_the_same_autoencoder_at_that_scale(kind: str) -> None:
    plain, large = _trainer(kind=kind), _trainer(kind=kind)
    large.begin(_planted(500, scale=64.0))
    _run(plain, 50)
    _run(large, 50, scale=64.0)
    x = _planted(10, 777)
    first, second = plain.saved({}).sae, large.saved({}).sae
    torch.testing.assert_close(second(64.0 * x), 64.0 * first(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        second.encode(64.0 * x).dense(32), 64.0 * first.encode(x).dense(32), rtol=1e-4, atol=1e-3
    )


def test_what_is_saved_is_what_was_trained() -> None:
    trainer = _trainer()
    _run(trainer, 30)
    x = _planted(64, 5)
    saved = trainer.saved({}).sae
    loss = ((saved(x) - x) / trainer.scale).square().sum(dim=1).mean()
    assert loss.item() == pytest.approx(trainer.train_step(x)["l2"], rel=1e-4)


def test_the_first_encoder_has_the_length_that_explains_most() -> None:
    x = _planted(500)

    def unexplained(factor: float, fitted: bool = True) -> float:
        trainer = _trainer(fitted_encoder=fitted)
        with torch.no_grad():
            trainer.sae.encoder *= factor
        with torch.no_grad():
            return fit(x, trainer.saved({}).sae(x) - x)["l2"]

    lengths = _trainer().sae.encoder.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(32))
    best = unexplained(1.0)
    assert best < min(unexplained(0.7), unexplained(1.4))
    assert best < 0.9 * unexplained(1.0, fitted=False)
    plain = _trainer(fitted_encoder=False).sae
    assert torch.equal(plain.encoder, plain.decoder)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_resuming_gives_the_same_bits(kind: str) -> None:
    whole, part = (_trainer(dead_after=128, kind=kind) for _ in range(2))
    wanted = _run(whole, 20)
    _run(part, 11)
    other = _trainer(dead_after=128, seed=3, kind=kind)
    other.restore(part.state())
    assert _run(other, 9) == wanted[11:]
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, other.state()[name]), name


def test_dead_latents_come_back_where_they_get_gradient() -> None:
    def share_dead(aux: str) -> float:
        trainer = _trainer(tokens=64 * 1000, dead_after=640, aux=aux)
        with torch.no_grad():
            trainer.sae.bias[8:] = -0.6
        _run(trainer, 1000)
        return float(trainer.dead.double().mean())

    assert share_dead("rectified") > 0.6
    assert share_dead("straight") < 0.3
    assert share_dead("input") < 0.3


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = SaeRecipe(tokens=2048 * 100, rate=1.0)
    rates = [rate_at(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([(100 - n) / 20 for n in range(80, 100)])
    published = SaeRecipe()
    assert published.steps == 73_242
    assert rate_at(published, 999) == rate_at(published, 1000) == 3e-4


def test_prefixes_are_shares_of_the_dictionary() -> None:
    assert SaeRecipe(kind="matryoshka", latents=65_536).prefix_ends == [
        2048, 6144, 14336, 30720, 65536,
    ]  # fmt: skip
    assert SaeRecipe(kind="matryoshka", latents=10, prefixes="0.3,1/2").prefix_ends == [3, 5, 10]
    assert SaeRecipe(kind="batchtopk").prefix_ends == []


@pytest.mark.parametrize(
    ("kind", "latents", "prefixes", "message"),
    [
        ("batchtopk", 64, "1/2", "means nothing to --kind batchtopk"),
        ("matryoshka", 64, "half", "not a list of numbers"),
        ("matryoshka", 64, "1/0", "not a list of numbers"),
        ("matryoshka", 64, "1/2,1/4", "have 32,16 latents"),
        ("matryoshka", 64, "1/2,1", "have 32,64 latents"),
        ("matryoshka", 24, None, "have 0,2,5,11 latents"),
    ],
)
def test_prefixes_that_do_not_grow_are_refused(
    kind: SaeKind, latents: int, prefixes: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        SaeRecipe(kind=kind, latents=latents, prefixes=prefixes)


def test_k_falls_to_its_own() -> None:
    recipe = SaeRecipe(tokens=2048 * 100, k_start=50, k_anneal=0.5)
    ks = [recipe.k_at(step, 10) for step in range(100)]
    assert ks[0] == 50
    assert ks[25] == 30
    assert set(ks[50:]) == {10}
    assert all(a >= b for a, b in itertools.pairwise(ks))


def test_variance_explained_by_both_definitions() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0]], dtype=torch.float64)
    shifted = fit(x, torch.ones(3, 2, dtype=torch.float64))  # a constant error
    assert shifted["fve"] == 1.0
    assert shifted["fvu"] == pytest.approx(6 / 32)
    assert shifted["l2"] == 2.0
    assert fit(x, x.mean(dim=0) - x)["fve"] == pytest.approx(0.0)


@pytest.mark.parametrize("count", [1, 50])
def test_a_batch_without_variance_has_none_to_explain(count: int) -> None:
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(3)).expand(count, -1)
    found = fit(x, torch.ones(count, 4))
    assert (found["fve"], found["fvu"]) == (None, None)
    assert found["l2"] == 4.0


def test_geometric_median_is_where_unit_pulls_balance() -> None:
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[0] = 1e6  # which a mean would follow
    median = geometric_median(x, rounds=1000, tolerance=1e-12)
    pulls = functional.normalize(x - median, dim=1).sum(dim=0)
    torch.testing.assert_close(pulls, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
