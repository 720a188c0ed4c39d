"""Counter-based noise: the same in every order, and as random as it must be."""

import math
import shutil

import pytest
import torch

from dlmctl.diffusion import draws
from dlmctl.diffusion.draws import gumbel_max
from dlmctl.diffusion.noise import (
    gumbel,
    key_tensor,
    normal,
    random_bits,
    stream_key,
    uniform,
)


def splitmix64(state: int, steps: int) -> list[int]:
    """The published generator in plain integers."""
    out = []
    for _ in range(steps):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_bits_are_those_of_splitmix64():
    for seed in (0, 1234567, 2**63 + 11):
        signed = seed - 2**64 if seed >= 2**63 else seed
        ours = random_bits(torch.tensor(signed), torch.arange(5))
        assert [b % 2**64 for b in ours.tolist()] == splitmix64(seed, 5)


def test_streams_with_different_names_differ_and_types_count():
    names = [("a", 1), ("a", "1"), ("a1",), ("a", 2), (1, "a")]
    assert len({stream_key(*name) for name in names}) == len(names)
    assert stream_key("sudoku/12", 3) == stream_key("sudoku/12", 3)


def test_uniform_numbers_fill_the_interval_evenly():
    keys = key_tensor([stream_key("test", n) for n in range(100)])
    numbers = uniform(keys[:, None], torch.arange(2000)[None]).flatten()
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, bins=50, min=0, max=1)
    expected = len(numbers) / 50
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 49 + 4 * math.sqrt(2 * 49)
    rows = uniform(keys[:, None], torch.arange(2000)[None])
    correlation = torch.corrcoef(rows[:2])[0, 1]
    assert abs(float(correlation)) < 0.1


def test_gumbel_noise_samples_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    keys = torch.arange(40000)
    drawn = (logits + gumbel(keys[:, None], torch.arange(4)[None])).argmax(dim=1).bincount(
        minlength=4
    ) / len(keys)
    expected = logits.softmax(0)
    error = (expected * (1 - expected) / len(keys)).sqrt()
    assert bool(((drawn - expected).abs() < 4 * error).all())


@pytest.mark.parametrize("tile", [65536, 50, 7, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_in_tiles_is_the_largest_of_logits_and_noise(monkeypatch, tile, dtype):
    logits = torch.randn(33, 41, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[:, 3] = -torch.inf
    keys = key_tensor([stream_key("row", n) for n in range(33)])
    noisy = logits.double() + 0.7 * gumbel(keys[:, None], torch.arange(41)[None])
    monkeypatch.setattr(draws, "TILE", tile)
    assert torch.equal(gumbel_max(logits, keys, 0.7), noisy.argmax(dim=1))
    least = logits.topk(5, dim=1).values[:, -1:]
    kept = noisy.masked_fill(logits < least, -torch.inf)
    assert torch.equal(gumbel_max(logits, keys, 0.7, least), kept.argmax(dim=1))
    assert gumbel_max(logits[:0], keys[:0], 0.7).shape == (0,)


LOGITS = {
    "spread": lambda normal: 3 * normal,
    "even": lambda normal: 0 * normal,
    "one token": lambda normal: normal + 30 * (torch.arange(5000) == 77),
    "few tokens": lambda normal: normal.masked_fill(torch.arange(5000) % 700 > 0, -torch.inf),
}


@pytest.mark.parametrize("temperature", [0.05, 0.9, 30.0])
@pytest.mark.parametrize("shape", LOGITS)
def test_a_draw_from_a_large_vocabulary_is_the_largest_of_logits_and_noise(
    monkeypatch, shape, temperature
):
    monkeypatch.setattr(draws, "TILE", 1024)
    logits = LOGITS[shape](torch.randn(9, 5000, generator=torch.Generator().manual_seed(2)))
    keys = key_tensor([stream_key("row", shape, n) for n in range(9)])
    noisy = logits.double() + temperature * gumbel(keys[:, None], torch.arange(5000)[None])
    assert torch.equal(gumbel_max(logits, keys, temperature), noisy.argmax(dim=1))
    for kept in (3, 4000):
        least = logits.topk(kept, dim=1).values[:, -1:]
        among = noisy.masked_fill(logits < least, -torch.inf)
        assert torch.equal(gumbel_max(logits, keys, temperature, least), among.argmax(dim=1))


def test_an_improbable_token_of_a_large_vocabulary_is_drawn_as_often_as_it_should():
    # All others together have a fifth of the probability, each of them hardly any.
    vocabulary = 4096
    logits = torch.zeros(1, vocabulary).index_fill(1, torch.tensor([9]), math.log(4 * 4095))
    keys = torch.arange(3000)
    drawn = gumbel_max(logits.expand(3000, -1), keys, 1.0)
    share = float((drawn == 9).double().mean())
    assert abs(share - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 3000)
    assert len(set(drawn.tolist())) > 500


def test_a_draw_from_logits_that_are_not_finite_ends():
    logits = torch.zeros(3, 5000)
    logits[0, 4], logits[1], logits[2, 6] = torch.nan, -torch.inf, torch.inf
    assert gumbel_max(logits, torch.arange(3), 0.9).tolist() == [4, 0, 6]


def test_normal_noise_has_the_moments_of_a_normal_distribution():
    noise = normal(key_tensor([stream_key("n", n) for n in range(50)])[:, None], torch.arange(4000))
    expected = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    for power, moment in expected.items():
        # The error of the mean of z^p is sqrt(Var(z^p) / N), Var(z^4) being 96.
        assert float((noise**power).mean()) == pytest.approx(moment, abs=5 * (96 / 200_000) ** 0.5)
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean(), (noise[1:] * noise[:-1]).mean()
    assert all(abs(float(value)) < 5 / 200_000**0.5 for value in neighbours)
    below = (noise < 1.0).double().mean()  # 0.8413 of a normal distribution
    assert float(below) == pytest.approx(0.8413, abs=5 * (0.8413 * 0.1587 / 200_000) ** 0.5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_draw_is_the_same_for_all_shapes():
    draws._fused.cache_clear()
    compiled = draws._fused(torch.device("cpu"))
    assert compiled is not draws._largest
    generator = torch.Generator().manual_seed(4)
    for rows, vocabulary in ((64, 1000), (3, 5001), (17, 40000), (2, 126464)):
        logits = torch.randn(rows, vocabulary, generator=generator) * 3
        keys = key_tensor([stream_key("row", n) for n in range(rows)])
        tokens, scale = torch.arange(vocabulary), torch.tensor(0.9, dtype=torch.float64)
        for least in (None, logits.topk(5, dim=1).values[:, -1:]):
            want = draws._largest(logits, keys, tokens, scale, least)
            assert torch.equal(compiled(logits, keys, tokens, scale, least), want)


def test_a_compiler_that_makes_other_noise_is_not_used(monkeypatch, capsys):
    def wrong(graph, inputs):
        return lambda *args: [out + 1 for out in graph.forward(*args)]

    def broken(graph, inputs):
        raise RuntimeError("no such architecture")

    for compiler, reason in ((wrong, "its noise differs"), (broken, "no such architecture")):
        draws._fused.cache_clear()
        torch.compiler.reset()
        monkeypatch.setattr(draws, "COMPILER", compiler)
        assert draws._fused(torch.device("cpu")) is draws._largest
        assert reason in capsys.readouterr().err
    draws._fused.cache_clear()
    torch.compiler.reset()
