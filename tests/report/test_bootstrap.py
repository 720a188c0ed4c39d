"""Bootstrap intervals against what is known."""

import math

import pytest
import torch

from dlmctl.report.bootstrap import mean_interval, quantile_interval, resampled
from dlmctl.settings.memorization import Bootstrap


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_a_share_is_about_that_of_a_normal(confidence):
    count, hits = 2000, 600
    values = (torch.arange(count) < hits).double()
    low, high = mean_interval(values, Bootstrap(4000, confidence))
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence)))
    half = z * math.sqrt(0.3 * 0.7 / count)
    assert low == pytest.approx(0.3 - half, abs=0.1 * half)
    assert high == pytest.approx(0.3 + half, abs=0.1 * half)


def test_intervals_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(11)
    covered = 0
    for _ in range(300):
        low, high = mean_interval(torch.randn(60, generator=generator) + 5, Bootstrap(300, 0.9))
        covered += low <= 5 <= high
    # Standard error 0.017; that of the percentile interval is a little too narrow.
    assert 0.84 < covered / 300 < 0.95


def test_the_interval_of_a_quantile_is_about_that_of_order_statistics():
    values = torch.arange(1000).double()
    low, high = quantile_interval(values, 0.95, Bootstrap(2000))
    half = 1.96 * math.sqrt(1000 * 0.95 * 0.05)
    assert low == pytest.approx(949 - half, abs=3)
    assert high == pytest.approx(949 + half, abs=3)


def test_one_seed_resamples_samples_together(monkeypatch):
    x = torch.randn(50, generator=torch.Generator().manual_seed(12))
    boot = Bootstrap(200)

    def means(values):
        return resampled(values, lambda drawn: drawn.mean(1), boot)

    both = means(x) - means(3 * x)
    torch.testing.assert_close(both, means(-2 * x))
    assert mean_interval(x, boot) == mean_interval(x, boot)
    assert mean_interval(x, boot) != mean_interval(x, Bootstrap(200, seed=1))
    # Nor do the parts matter that resamples are drawn in.
    whole = mean_interval(x, boot)
    monkeypatch.setattr("dlmctl.report.bootstrap.PART", 50 * 7)
    assert mean_interval(x, boot) == whole
    assert mean_interval(torch.ones(9), Bootstrap()) == (1.0, 1.0)
