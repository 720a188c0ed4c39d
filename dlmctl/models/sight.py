"""Whether a class of transformers computes what its family says, found by experiment.

A config says `is_causal = False`, but it is the code of a class that attends, or that passes a
state from left to right as recurrent layers do. It may also change its logits after the output
head. A model of a class that is not known to be right is tried on eight tokens when it is loaded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dlmctl.models.architecture import FAULTS
from dlmctl.models.attention import Blocks
from dlmctl.models.blocks import Edit, blocks, edited_blocks
from dlmctl.models.families import HOW_TO_READ
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, reason_of

TOKENS = 8

TESTED = frozenset(
    f"{kind}ForCausalLM"
    for kind in (
        "Arcee", "Cohere", "Cohere2", "Ernie4_5", "Gemma", "Gemma2", "Gemma3", "Glm4Moe", "Granite",
        "Llama", "Ministral3", "Mistral", "Mixtral", "Olmo2", "Olmo3", "Phi", "Phi3", "Qwen2",
        "Qwen2Moe", "Qwen3", "Qwen3Moe", "SmolLM3", "Starcoder2",
    )
).union(
    ("GPT2LMHeadModel", "BertForMaskedLM", "ModernBertForMaskedLM", "RobertaForMaskedLM")
)  # fmt: skip
"""Classes that attend as `is_causal` says in every block, and whose logits `Head` computes:
tests/models/test_sight.py tries each."""

PRECISION = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference of logits that compute the same, in parts of the largest logit; 0.02 in 16
bits."""


@torch.no_grad()
def check_class(policy: Policy) -> None:
    """Refuse a model whose class attends, or computes its logits, otherwise than dlmctl expects.

    Models of tested classes, and those that take images, are not tried.

    Raises:
        DataError: the class is not right, or a pass fails.
    """
    if type(policy.core).__name__ in TESTED or policy.vision is not None:
        return
    try:
        reason = _attends_otherwise(policy) or _other_logits(policy)
    except (DataError, *FAULTS) as error:
        reason = f"a pass of it fails ({reason_of(error)})"
    if reason:
        raise DataError(f"{policy.name}: {reason}")


def _attends_otherwise(policy: Policy) -> str | None:
    """How the class attends, if not as the family says."""
    pattern = policy.model_family.pattern
    if pattern is None:  # as the class has it
        return None
    if pattern == "causal":
        first, second = (policy.hidden(ids, None)[0, :-1].float() for ids in _eight(policy))
        apart = float((first - second).abs().max())
        if apart <= _tolerance(policy) * float(first.abs().max()):
            return None
        return (
            f"a {type(policy.core).__name__} lets tokens see later ones, so that it is no "
            f"left-to-right model with this config.json: {HOW_TO_READ}"
        )
    return blind_block(policy)


def blind_block(policy: Policy) -> str | None:
    """A sentence about the first block that no later token reaches; None if there is none."""
    if not (blind := left_to_right_blocks(policy)):
        return None
    return (
        f"block {blind[0]} of a {type(policy.core).__name__} reads from left to right only, "
        "whatever config.json says: it cannot denoise"
    )


def _other_logits(policy: Policy) -> str | None:
    """How far the logits of the class are from those of the output head, if not close by."""
    ids, _ = _eight(policy)
    stock: Tensor = policy.core(input_ids=ids).logits[0, -1:].float()  # [1, V]
    ours = policy.logits(replace(policy, blocks=None).hidden(ids, None)[0, -1:]).float()
    apart, largest = float((stock - ours).abs().max()), float(stock.abs().max())
    if apart <= _tolerance(policy) * largest:
        return None
    return (
        f"a {type(policy.core).__name__} changes its logits after the output head (by up to "
        f"{apart:.3g} of {largest:.3g}), in a way that dlmctl does not know"
    )


def _eight(policy: Policy) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, int64 [1, T], that differ in the last."""
    ids = torch.arange(TOKENS, device=policy.device)[None] % policy.vocab_size
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % policy.vocab_size
    return ids, changed


def _tolerance(policy: Policy) -> float:
    return PRECISION.get(next(policy.model.parameters()).dtype, 0.02)


@torch.no_grad()
def left_to_right_blocks(policy: Policy) -> list[int]:
    """The blocks (layers) in which no position sees the last of eight tokens.

    A block-causal model has all eight in one block of its text.
    Every block is tried by itself: its input differs at the last position alone, so that its output
    differs at others only if these see it.
    """
    if policy.blocks is not None:
        policy = replace(policy, blocks=Blocks(TOKENS))
    ids, changed = _eight(policy)
    first = _outputs(policy, ids, {})
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
