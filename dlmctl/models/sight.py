"""Whether the blocks of a model see in both directions, found by experiment.

A config says `is_causal = False`, but it is the code of a class that attends, or that passes a
state from left to right as recurrent layers do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dlmctl.models.attention import Blocks
from dlmctl.models.blocks import Edit, blocks, edited_blocks
from dlmctl.models.policy import Policy

TOKENS = 8


@torch.no_grad()
def left_to_right_blocks(policy: Policy) -> list[int]:
    """The blocks (layers) in which no position sees the last of eight tokens.

    A block-causal model has all eight in one block of its text.
    Every block is tried by itself: its input differs at the last position alone, so that its output
    differs at others only if these see it.
    """
    if policy.blocks is not None:
        policy = replace(policy, blocks=Blocks(TOKENS))
    ids = torch.arange(TOKENS, device=policy.device)[None] % policy.vocab_size  # [1, T]
    first = _outputs(policy, ids, {})
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % policy.vocab_size
    second = _outputs(policy, changed, first)
    return [b for b in first if torch.equal(first[b][:, :-1], second[b][:, :-1])]


def _outputs(policy: Policy, ids: Tensor, shown: dict[int, Tensor]) -> dict[int, Tensor]:
    """The outputs [1, T, H] of all blocks.

    Args:
        shown: outputs that the next block is given at all positions but the last, in place of
            those that are returned.
    """
    outputs: dict[int, Tensor] = {}

    def keep(block: int) -> Edit:
        def run(output: Tensor, _: Tensor) -> Tensor:
            outputs[block] = output
            if block not in shown:
                return output
            return torch.cat([shown[block][:, :-1], output[:, -1:]], dim=1)

        return run

    with edited_blocks(policy, {block: keep(block) for block in range(len(blocks(policy)))}):
        policy.hidden(ids, None)
    return outputs
