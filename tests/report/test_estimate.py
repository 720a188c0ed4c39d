"""Standard errors over documents."""

import pytest
import torch

from dlmctl.report.estimate import Estimate, auroc_estimate, mean_estimate, stratified_mean

SCORES = torch.tensor([0.3, 1.0, 1.0, -2.0, 0.3, 4.0, 0.0, 1.0], dtype=torch.float64)
PRESENT = torch.tensor([True, True, False, False, False, True, False, True])
STRATUM = torch.tensor([0, 2, 2, 1, 1, 1, 0, 2])


def weighted_auroc(weights):
    """The share of pairs in order, each thing being there as often as its weight says."""
    above = SCORES[PRESENT][:, None] - SCORES[~PRESENT]
    order = (above > 0).double() + 0.5 * (above == 0)
    yes, no = weights[PRESENT], weights[~PRESENT]
    return yes @ order @ no / (yes.sum() * no.sum())


def weighted_means(weights):
    parts = [STRATUM.eq(s) for s in range(3)]
    return sum((weights * SCORES)[part].sum() / weights[part].sum() for part in parts) / 3


@pytest.mark.parametrize(
    ("statistic", "estimate"),
    [
        (weighted_auroc, auroc_estimate(SCORES, PRESENT)),
        (weighted_means, stratified_mean(SCORES, STRATUM)),
        (
            lambda w: weighted_auroc(w) / weighted_means(w),
            auroc_estimate(SCORES, PRESENT).over(stratified_mean(SCORES, STRATUM)),
        ),
        (
            lambda w: (weighted_auroc(w) + weighted_means(w)) / 2,
            mean_estimate([auroc_estimate(SCORES, PRESENT), stratified_mean(SCORES, STRATUM)]),
        ),
    ],
)
def test_influences_are_derivatives_by_how_often_a_thing_is_there(statistic, estimate):
    weights = torch.ones(8, dtype=torch.float64, requires_grad=True)
    value = statistic(weights)
    [gradient] = torch.autograd.grad(value, weights)
    assert estimate.value == pytest.approx(value.item())
    torch.testing.assert_close(estimate.influence, gradient)
    assert abs(float(estimate.influence.sum())) < 1e-12


def test_the_error_of_a_mean_is_that_of_the_sums_of_documents():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    estimate = stratified_mean(values, torch.zeros(4).long())
    alone = estimate.error(torch.arange(4))
    assert alone == pytest.approx(float(values.std() / 2))
    # Two documents: deviations -4.5 and 4.5 from the mean, summed over each, of four values.
    assert estimate.error(torch.tensor([0, 0, 1, 1])) == pytest.approx(4.5 / 4 * 2)
    assert estimate.error(torch.zeros(4)) is None
    assert (estimate - estimate).error(torch.arange(4)) == 0.0


def test_the_error_of_an_auroc_is_its_spread_over_corpora():
    generator = torch.Generator().manual_seed(3)
    document = torch.arange(60).repeat_interleave(4)
    found: list[Estimate] = []
    for _ in range(300):
        present = (torch.rand(60, generator=generator) < 0.4)[document]
        shared = torch.randn(60, generator=generator)[document]
        scores = present + shared + torch.randn(240, generator=generator)
        found.append(auroc_estimate(scores, present))
    spread = float(torch.tensor([e.value for e in found]).std())
    by_document = sum(e.error(document) for e in found) / 300
    by_sentence = sum(e.error(torch.arange(240)) for e in found) / 300
    assert by_document == pytest.approx(spread, rel=0.12)
    assert by_sentence < 0.7 * spread
