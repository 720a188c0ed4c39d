"""Top-K and JumpReLU autoencoders against matrices written out in full."""

import pytest
import torch

from dlmctl.sae.chunks import join_codes
from dlmctl.sae.evaluation.stability import compare
from dlmctl.sae.topk import Codes, JumpReluSae, TopKSae, combine


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(3)
    made = TopKSae(6, 20, 4).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
        made.W_dec /= made.W_dec.norm(dim=1, keepdim=True)
    return made


@pytest.fixture
def x():
    return torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def written_out(sae, x):
    """Dense codes, by sorting."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    smallest_kept = pre.sort(dim=1, descending=True).values[:, sae.k - 1 : sae.k]
    return pre.relu() * (pre >= smallest_kept)


def test_codes_are_the_largest_positive_pre_activations(sae, x):
    codes = sae.encode(x)
    torch.testing.assert_close(codes.dense(sae.d_sae), written_out(sae, x))
    assert codes.values.shape == codes.indices.shape == (9, 4)
    assert (codes.values >= 0).all()


def test_where_fewer_than_k_are_positive_the_rest_is_zero(sae, x):
    with torch.no_grad():
        sae.b_enc -= 3.0
    codes = sae.encode(x)
    assert ((codes.values > 0).sum(dim=1) < 4).any()
    torch.testing.assert_close(codes.dense(sae.d_sae), written_out(sae, x))


def test_the_sparse_decoder_is_the_dense_one_and_so_are_its_gradients(sae, x):
    x.requires_grad_()
    dense = written_out(sae, x) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x), dense)
    inputs = [x, *sae.parameters()]
    upstream = torch.randn(dense.shape, dtype=dense.dtype)
    sparse = torch.autograd.grad(sae(x), inputs, upstream)
    for found, expected in zip(sparse, torch.autograd.grad(dense, inputs, upstream), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_finite_differences(sae, x):
    assert torch.autograd.gradcheck(sae, x.requires_grad_())


def test_a_latent_that_is_named_twice_counts_twice():
    codes = Codes(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1]]))
    rows = torch.tensor([[5.0, 5.0], [1.0, 10.0]])
    assert combine(codes, rows).tolist() == [[3.0, 30.0]]
    assert codes.dense(2).tolist() == [[0.0, 3.0]]


@pytest.fixture
def jump():
    """Latents with thresholds of their own, some below 0, and one that is never reached."""
    generator = torch.Generator().manual_seed(3)
    made = JumpReluSae(6, 20).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
        made.threshold.normal_(generator=generator).add_(1.0)
        made.threshold[4] = torch.inf
    return made


def above_thresholds(jump, x):
    pre = (x - jump.b_dec) @ jump.W_enc + jump.b_enc
    return torch.where((pre > jump.threshold) & (pre > 0), pre, 0.0)


def test_every_latent_above_its_threshold_is_active(jump, x):
    codes, dense = jump.encode(x), above_thresholds(jump, x)
    assert bool((jump.threshold < 0).any())
    counts = (dense > 0).sum(dim=1)
    assert counts.min() < counts.max() == codes.values.shape[1]
    torch.testing.assert_close(codes.dense(20), dense)
    torch.testing.assert_close(jump(x), dense @ jump.W_dec + jump.b_dec)
    torch.testing.assert_close(jump.rectified(jump.pre_activations(x)), dense)


def test_without_an_active_latent_the_bias_is_left(jump, x):
    jump.threshold.fill_(1e9)
    torch.testing.assert_close(jump(x), jump.b_dec.expand(9, -1))
    assert jump.encode(x).values.shape == (9, 1)
    assert jump.encode(x[:0]).values.shape == (0, 1)


def test_codes_of_parts_are_codes_of_the_whole(jump, x):
    parts = [jump.encode(part) for part in x.split(2)]
    assert len({part.values.shape[1] for part in parts}) > 1
    joined = join_codes(parts)
    torch.testing.assert_close(joined.dense(20), above_thresholds(jump, x))
    # Nor does the comparison of codes see the padding.
    other = jump.encode(x.flip(0))
    torch.testing.assert_close(compare(joined, other), compare(jump.encode(x), other))
