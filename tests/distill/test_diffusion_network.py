"""The networks: shapes from small gray to larger colour, and what they depend on."""

import pytest
import torch

from dlmctl.distill.image_networks import NetworkConfig, make_network
from dlmctl.records.errors import UsageError

CONFIGS = [
    NetworkConfig("unet", (1, 8, 8), 8, (1, 2), 1),
    NetworkConfig("unet", (3, 32, 32), 8, (1, 2, 2), 2, attention=(1, 2), heads=2),
    NetworkConfig("unet", (1, 8, 12), 12, (1,), 1, attention=(0,)),
    NetworkConfig("mlp", (5,), 16, (), 2),
    NetworkConfig("mlp", (1, 8, 8), 16, (), 1),
]


def opinionated(config: NetworkConfig) -> torch.nn.Module:
    """A network whose last layers are not zero."""
    torch.manual_seed(0)
    network = make_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_row_depends_on_its_own_input_and_level(config):
    network = opinionated(config)
    x, c = torch.randn(3, *config.shape), torch.tensor([-1.0, 0.0, 0.7])
    out = network(x, c)
    assert out.shape == x.shape
    torch.testing.assert_close(network(x[1:2], c[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
    assert (network(x, c + 0.3) - out).flatten(1).norm(dim=1).min() > 1e-3
    assert (network(x + 0.3, c) - out).flatten(1).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_weight_takes_part(config):
    network = opinionated(config)
    network(torch.randn(2, *config.shape), torch.randn(2)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_new_network_gives_zero():
    for config in CONFIGS:
        assert not make_network(config)(torch.randn(2, *config.shape), torch.zeros(2)).any()


def test_attention_mixes_places_that_convolutions_do_not_reach():
    reached = []
    for attention in ((), (0,)):
        config = NetworkConfig("unet", (1, 1, 64), 8, (1,), 1, attention, 2)
        network = opinionated(config)
        # Statistics over all places mix them too; without them, convolutions alone are left.
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x
        x = torch.randn(1, 1, 1, 64)
        other = x.clone()
        other[..., 0] += 1
        away = network(other, torch.zeros(1)) - network(x, torch.zeros(1))
        reached.append(bool(away[..., -1].abs() > 1e-8))
    assert reached == [False, True]


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"shape": (64,)}, "vectors of 64"),
        ({"shape": (1, 9, 8)}, "8x9 cannot be halved 1 times"),
        ({"shape": (1, 8, 8), "attention": (2,)}, "2 levels"),
        ({"shape": (1, 8, 8), "attention": (0,), "width": 6}, "4 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, complaint):
    with pytest.raises(UsageError, match=complaint):
        NetworkConfig("unet", **sizes)
