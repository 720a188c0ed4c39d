"""What the norm behind the last block does to a direction of the residual stream.

With x = (h - mean h) / s, s the size of h - mean h, a LayerNorm returns g x + b, and an RMSNorm the
same without the mean. While s does not change, a step v in h is a step g (v - mean v) / s in what
the norm returns, or g v / s. The gain g is the weight in most classes, 1 + weight in Gemma's, and 1
where there is none. It is read from what the module returns, whatever its class:

    norm(c a) and norm(-c a), a = +1, -1, +1, …: half their difference is g (a - mean a) / size a

where c is large, so that the epsilon of the norm counts for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.policy import Policy

LARGE = 100.0


def final_norm(policy: Policy) -> nn.Module | None:
    """The norm behind the last block; None for encoders whose blocks end with a norm of their own.

    It is a sibling module of the blocks whose class has "norm" in its name.
    """
    wanted = decoder_blocks(policy)
    around = next(m for m in policy.core.modules() if any(c is wanted for c in m.children()))
    norms = [child for child in around.children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


@torch.no_grad()
def through_final_norm(policy: Policy, directions: Tensor) -> Tensor:
    """Directions [n, d] times the gain, and without their mean if the norm removes it.

    The division by the size of the activations is left out: it is one number for a position.
    """
    norm = final_norm(policy)
    if norm is None:
        return directions
    one = torch.ones(policy.width, device=policy.device, dtype=policy.core.dtype)
    signs = one.clone()
    signs[1::2] = -1
    plus, minus, flat = norm(LARGE * torch.stack([signs, -signs, one])).to(directions).unbind()
    bias, signs = (plus + minus) / 2, signs.to(directions)
    if torch.allclose(flat, bias, atol=1e-3 * float((plus - minus).abs().amax())):
        # Nothing is left of a constant: it removes the mean.
        centred = signs - signs.mean()
        gain = (plus - minus) / 2 * centred.square().mean().sqrt() / centred
        return (directions - directions.mean(dim=1, keepdim=True)) * gain
    return directions * ((plus - minus) / 2 * signs)
