"""Counter-based noise: the same in every order, and as random as it must be."""

import math

import torch

from dlmctl.diffusion.noise import gumbel, key_tensor, random_bits, stream_key, uniform


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
    noise = gumbel(keys[:, None], torch.arange(4)[None])
    drawn = (logits + noise).argmax(dim=1).bincount(minlength=4) / len(keys)
    expected = logits.softmax(0)
    error = (expected * (1 - expected) / len(keys)).sqrt()
    assert bool(((drawn - expected).abs() < 4 * error).all())
