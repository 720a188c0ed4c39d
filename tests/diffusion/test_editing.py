"""Editing: decided tokens that later steps replace, against LLaDA2.1's code and a plain loop.

llada2.1/reference.json has greedy completions of the authors' `generate` of LLaDA2.1, and how many
forward passes each took, on the weights of tests/models/published/llada2.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from test_block_diffusion import KINDS, block_policy, plain_logits

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import configured
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.attention import Blocks
from dlmctl.models.loading import load_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.decoding import check_left_to_right
from dlmctl.settings.sampler import Sampler

WEIGHTS = Path(__file__).parents[1] / "models" / "published" / "llada2"
REFERENCE = json.loads((Path(__file__).parent / "llada2.1" / "reference.json").read_text())
PROMPTS = [[3, 4], [5], [6, 7, 8], [4, 4, 5, 6, 7]]


@pytest.fixture(scope="module")
def llada2(tmp_path_factory):
    place = tmp_path_factory.mktemp("llada2")
    shutil.copytree(WEIGHTS, place, dirs_exist_ok=True)
    character_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 61)))).save_pretrained(place)
    return load_policy(f"{place},mask_id=60,block_length=4", "cpu")


def edited(call):
    """The options of a call of the authors' `generate`."""
    threshold = call["editing_threshold"]
    steps = call["max_post_steps"] if threshold < 1 else None
    options = Sampler(REFERENCE["gen_length"], threshold=call["threshold"])
    return dataclasses.replace(options, edit_threshold=threshold, edit_steps=steps)


@pytest.mark.parametrize("cache", ["none", "exact"])
def test_greedy_completions_are_token_for_token_those_of_llada21(llada2, cache):
    prompts, replaced, changed = REFERENCE["prompts"], set(), set()
    for call in REFERENCE["calls"]:
        options = dataclasses.replace(edited(call), cache=cache)
        ours = sample(llada2, prompts, [0] * 4, configured(llada2, options))
        plain = dataclasses.replace(options, edit_threshold=None, edit_steps=None)
        without = sample(llada2, prompts, [0] * 4, configured(llada2, plain))
        # Theirs ends with the first end-of-sequence.
        for done, other, theirs in zip(ours, without, call["completions"], strict=True):
            assert done.tokens[: len(theirs)] == theirs
            if done.edits:
                replaced.add(call["editing_threshold"])
            if done.tokens != other.tokens:
                changed.add(call["editing_threshold"])
        if options.editing:  # theirs has one more step for each block if it edits nothing
            assert [done.nfe for done in ours] == call["passes"]
    assert replaced == changed == {0.0, 0.2, 0.5}


def plain_edit(policy, prompt, gen_length, options):
    """Greedy sampling with editing, a whole pass in each step; returns the tokens, the steps of
    their last decisions, the passes, the replacements and the positions predicted."""
    start, size = len(prompt), policy.blocks.length
    from_text = policy.blocks.origin == "text"
    first, width = (start // size * size if from_text else start), start + gen_length
    width += -width % size if from_text else 0
    ids, order, edits = [*prompt, *[policy.mask_id] * (width - start)], {}, [0] * width
    passes = predicted = 0
    for block, begin in enumerate(range(first, width, size)):
        end, step, without_masks = min(begin + size, width), 0, 0
        while True:
            left = [p for p in range(begin, end) if ids[p] == policy.mask_id]
            if not left and without_masks == options.edit_steps:
                break
            without_masks += not left
            logits = plain_logits(policy, ids[:end], start)
            sure = logits.softmax(-1)
            logits[:, policy.mask_id] = -torch.inf
            token = logits.argmax(-1).tolist()
            p = {place: float(sure[place, token[place]]) for place in range(begin, end)}
            written = [place for place in left if p[place] >= options.threshold]
            written = written or sorted(left, key=lambda place: -p[place])[:1]
            # The first token of a block is then predicted by a clean token, always alike.
            settled = {begin} if policy.shift else {}
            decided = [place for place in range(begin, end) if place not in {*left, *settled}]
            decided = [place for place in decided if place >= start]
            for place in decided:
                if p[place] > options.edit_threshold and token[place] != ids[place]:
                    written.append(place)
                    edits[place] += 1
            for place in written:
                ids[place] = token[place]
                order[place] = block * (size + options.edit_steps) + step
            passes, predicted, step = passes + 1, predicted + len(left + decided), step + 1
            if not left and not written:
                break
    kept = range(start, start + gen_length)
    replaced = sum(edits[place] for place in kept)
    return [ids[p] for p in kept], [order[p] for p in kept], passes, replaced, predicted


@pytest.mark.parametrize("cache", ["none", "exact"])
@pytest.mark.parametrize(("origin", "shift"), KINDS)
def test_a_block_is_edited_until_nothing_changes(origin, shift, cache):
    policy, length, seen, counts = block_policy(origin, shift, seed=3), 8, [], set()
    policy.model.lm_head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    for threshold, bound, steps in (0.3, 0.0, 3), (0.5, 0.3, 16), (0.9, 0.5, 0), (0.9, 0.7, 16):
        options = Sampler(length, threshold=threshold, edit_threshold=bound, edit_steps=steps)
        config = configured(policy, dataclasses.replace(options, cache=cache))
        wanted = [plain_edit(policy, prompt, length, options) for prompt in PROMPTS]
        seen.clear()
        ours = sample(policy, PROMPTS, [1, 2, 3, 4], config)
        assert [(s.tokens, s.order, s.nfe, s.edits) for s in ours] == [w[:4] for w in wanted]
        # No other position reaches the vocabulary.
        assert sum(seen) == sum(predicted for *_, predicted in wanted)
        counts |= {s.edits for s in ours}
    assert 0 in counts
    assert max(counts) > 2


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.6},
        {"steps": 6, "alg_temp": 0.5},
        {"factor": 1.0, "confidence_of": "sampled"},
        {"threshold": 0.6, "cfg_scale": 0.5},
        {"sub_block_length": 2, "remasking": "margin"},
    ],
)
def test_an_edited_sample_does_not_depend_on_its_neighbours(options):
    policy, keys = block_policy("text", 0, seed=4), [1, 2, 3, 4]
    config = configured(policy, Sampler(8, temperature=0.8, edit_threshold=0.2, **options))
    together = sample(policy, PROMPTS, keys, config)
    pairs = zip(PROMPTS, keys, strict=True)
    assert together == [sample(policy, [p], [k], config)[0] for p, k in pairs]
    assert max(s.edits for s in together) > 0
    assert not any(policy.mask_id in s.tokens for s in together)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_first_token_of_a_block_is_settled_if_a_clean_token_predicts_it(shift):
    alone = Blocks(4, "completion", causal_context=True, first_alone=True)
    policy = dataclasses.replace(block_policy(shift=shift, seed=3), blocks=alone)
    settings = Sampler(12, temperature=0.8, threshold=0.5, edit_threshold=0.1)
    exact, plain = (
        sample(
            policy,
            PROMPTS,
            [1, 2, 3, 4],
            configured(policy, dataclasses.replace(settings, cache=rule)),
        )
        for rule in ("exact", "none")
    )
    assert exact == plain
    per_block = 4 + 16
    for s in exact:
        assert [step % per_block for step in s.order[::4]] == [0, 0, 0]
        assert s.edits > 0


def test_steps_of_editing_have_noise_of_their_own_and_end():
    """With one token a block and nothing before it, a step redraws the token until it is drawn
    twice, or no more often than told."""
    policy = block_policy("completion", 0, length=1)
    policy.model.lm_head.weight.data.zero_()  # all tokens are equally probable
    config = configured(policy, Sampler(1, temperature=1.0, edit_threshold=0.0, edit_steps=3))
    samples = sample(policy, [[3]] * 400, list(range(400)), config)
    others = policy.vocab_size - 1  # all but the mask token
    for s in samples:
        assert s.nfe == min(s.edits + 2, 4)
        assert s.order[0] == s.edits
    ended = sum(s.edits == 0 for s in samples) / len(samples)
    assert abs(ended - 1 / others) < 4 * (1 / others / len(samples)) ** 0.5
    assert sum(s.edits == 3 for s in samples) > 200


def records(policy, options):
    """Completions as `rollout` writes them."""
    record = Record(id="a", tokens={"prompt": [3, 4, 8]})
    record.where = "samples.jsonl:3"
    return list(rollout([record], policy, configured(policy, options), 6, 0, 6))


def test_records_say_how_often_and_by_which_options_tokens_were_replaced():
    policy = block_policy("text", 0, seed=3)
    edits = [
        r["rollout"]["edits"]
        for r in records(policy, Sampler(8, temperature=1.0, threshold=0.5, edit_threshold=0.0))
    ]
    assert max(edits) > 0
    [made, *_] = records(policy, Sampler(8, threshold=0.5, edit_threshold=0.0))
    sampler = made["rollout"]["sampler"]
    assert (sampler["edit_threshold"], sampler["edit_steps"]) == (0.0, 16)


def test_without_the_option_nothing_is_edited_and_records_do_not_mention_it():
    policy = block_policy("text", 0, seed=3)
    options = Sampler(8, temperature=1.0, threshold=0.5)
    plain = records(policy, options)
    assert plain == records(policy, dataclasses.replace(options, edit_threshold=1.0))
    assert not [
        key for key in (*plain[0]["rollout"], *plain[0]["rollout"]["sampler"]) if "edit" in key
    ]
    own = dataclasses.replace(policy, sampling={"edit_threshold": 0.0, "edit_steps": 2})
    assert records(own, options) != plain
    assert records(own, dataclasses.replace(options, edit_threshold=1.0)) == plain
    assert not configured(own, dataclasses.replace(options, remasking="random")).editing


def test_what_follows_the_order_of_decoding_refuses_edited_completions():
    policy, plan = block_policy("text", 0, seed=3), MaskPlan("trajectory", 2, 0)
    options = Sampler(8, temperature=1.0, threshold=0.5, edit_threshold=0.8)
    made = records(policy, options)
    counts = {record["rollout"]["edits"] > 0 for record in made}
    assert counts == {False, True}
    for record in made:
        if not record["rollout"]["edits"]:
            example_of(record, policy, plan)
            continue
        fault = "samples.jsonl:3: 'rollout.edits' is [1-9]"
        with pytest.raises(DataError, match=fault):
            example_of(record, policy, plan)
        with pytest.raises(DataError, match=fault):
            check_left_to_right([record], policy)
        example_of(record, policy, dataclasses.replace(plan, law="uniform"))


def test_what_does_not_go_with_editing_is_refused():
    policy = block_policy()
    with pytest.raises(UsageError, match="for block-causal models"):
        configured(tiny_policy(), Sampler(edit_threshold=0.5))
    with pytest.raises(UsageError, match="give --edit-threshold too"):
        configured(policy, Sampler(edit_steps=2))
    for remasking in ("random", "entropy", "sae"):
        with pytest.raises(UsageError, match="--edit-threshold compares a confidence"):
            Sampler(edit_threshold=0.5, remasking=remasking)
    with pytest.raises(UsageError, match="no confidence, from 0 to 1"):
        Sampler(edit_threshold=1.1)
    entropic = dataclasses.replace(policy, sampling={"remasking": "entropy"})
    assert configured(entropic, Sampler(edit_threshold=0.5)).remasking == "low_confidence"
