"""Block outputs are those that transformers gives; what is put in their place is what counts."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_policy

from dlmctl.models.attention import plain_rows
from dlmctl.models.blocks import block_name, block_outputs, blocks, check_layers, edited_blocks
from dlmctl.models.policy import Family
from dlmctl.records.errors import UsageError

IDS = torch.tensor([[3, 4, 5, 2, 2, 6], [4, 2, 6, 5, 0, 0]])
THERE = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


@pytest.mark.parametrize("family", ["llada", "dream", "a2d", "mlm", "ar"])
@torch.no_grad()
def test_outputs_are_those_of_transformers(family: Family) -> None:
    policy = tiny_policy(family, layers=3)
    theirs = policy.core(
        input_ids=IDS, attention_mask=THERE.long(), output_hidden_states=True
    ).hidden_states
    found = block_outputs(policy, plain_rows(IDS, THERE), [1, 0])
    assert set(found) == {0, 1}
    for layer, output in found.items():
        torch.testing.assert_close(output[THERE], theirs[layer + 1][THERE])


@torch.no_grad()
def test_no_block_behind_the_last_wanted_one_runs() -> None:
    policy = tiny_policy(layers=3)
    ran = []
    for number, block in enumerate(blocks(policy)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    block_outputs(policy, plain_rows(IDS, THERE), [0, 1])
    assert ran == [0, 1]


@torch.no_grad()
def test_an_output_put_in_place_is_what_the_blocks_behind_see() -> None:
    policy = tiny_policy(layers=3)
    other = IDS.roll(1, dims=1)
    wanted = policy.hidden(other, None)
    replaced = block_outputs(policy, plain_rows(other, None), [1])[1]
    seen = []

    def replace(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return replaced

    with edited_blocks(policy, {1: replace}):
        torch.testing.assert_close(policy.hidden(IDS, None), wanted)
    assert torch.equal(seen[0], IDS)
    with pytest.raises(AssertionError):  # and afterwards no longer
        torch.testing.assert_close(policy.hidden(IDS, None), wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "mlm", "ar"])
def test_an_edit_is_told_what_is_padding(family: Family) -> None:
    policy, seen = tiny_policy(family), []

    def look(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return output

    with edited_blocks(policy, {0: look}):
        policy.hidden(IDS, THERE)
    assert torch.equal(seen[0], IDS.where(THERE, -1))


def test_names_and_numbers_of_blocks() -> None:
    policy = tiny_policy(layers=3)
    assert block_name(policy, 2) == "model.layers.2"
    with pytest.raises(UsageError, match="layers 0 to 2, and no layer 3"):
        check_layers(policy, [0, 3])


@torch.no_grad()
def test_outputs_of_a_block_causal_model_are_those_of_each_block_after_its_clean_past() -> None:
    policy = tiny_policy("sdar", layers=3)  # blocks of 4, counted from the beginning of the text
    mask = policy.mask_id or 0
    noised = IDS.masked_fill(torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]]).bool(), mask)
    lengths = THERE.sum(dim=1)
    rows = policy.noised_rows(IDS, noised, THERE, torch.zeros_like(lengths), lengths)
    found = block_outputs(policy, rows, [0, 2])
    second = torch.cat([IDS[:, :4], noised[:, 4:]], dim=1)
    for layer, output in found.items():
        alone = block_outputs(policy, plain_rows(noised[:, :4], None), [layer])[layer]
        torch.testing.assert_close(output[:, :4], alone)
        alone = block_outputs(policy, plain_rows(second, THERE), [layer])[layer]
        torch.testing.assert_close(output[:1, 4:], alone[:1, 4:])
