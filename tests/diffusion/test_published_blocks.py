"""Block diffusion models as their authors publish them, against what the authors' code computes.

`published/NAME` has a config.json with the fields of the published one and the sizes of a very
small model, its weights under the authors' names, and what their code computed with them in
float32 on a CPU: logits, greedy completions of their own sampler and logits of training.

How a directory was made: two layers of 16 dimensions, two heads of 8, one for keys, 64 tokens of
which 60 is the mask (of the mixture, four experts of width 8, of which a token takes two). Every
weight was drawn from N(0, 0.09), those of norms from N(1, 0.09); the output head was multiplied by
5 and its rows 60 to 63 by 0.05, so that no special token is ever predicted. A seed was taken with
which no two choices of a sampler, nor a confidence and a threshold, are closer than 1e-4. The
options of their samplers stand under the names that they have here.

    sdar                     modeling_sdar.py and the sampler of the OpenCompass evaluation of
                             JetAstra/SDAR (top_k 1), in transformers 4.52.4
    sdar-moe                 the same sampler; modeling_sdar_moe.py of SDAR-30B-A3B-Chat-b32 as
                             PKU-SEC-Lab/TEAM-MoE-dLLM keeps it, with a config.json written after
                             Qwen3-MoE's; training by the law of the dense model
    fast-dllm-v2             modeling.py of Fast_dLLM_v2_7B, from a public copy of the hub's
                             directory, and the `generate` in it, in transformers 4.53.1
    bd3lm                    A2D-Qwen3, sampler and trainer of ZHZisZZ/dllm, in transformers 4.57.1
    stable-diffcoder         modeling_stable_diffcoder.py and its `generate_block`, in transformers
                             4.57.1. The file has ByteDance's header and was found in a public
                             repository, not seen on the hub. No training code is public.
    nemotron-labs-diffusion  `generate` and the training mask retyped from nvidia's modeling file,
                             without its budget for thinking. Its decoder, modeling_ministral.py,
                             is not to be had: the layers are Ministral3's of transformers 5.24,
                             so this tests the order of passes, the masks and the names, and not
                             whether Ministral3 is their decoder.

Kernels that need a GPU (flash_attn, compiled flex_attention, a fused loss) were replaced by plain
attention with the same mask.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from dlmctl.diffusion.elbo import scored_states
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import configured
from dlmctl.models.architecture import architecture
from dlmctl.models.attention import Blocks
from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError
from dlmctl.settings.models import Reading
from dlmctl.settings.sampler import Sampler

PUBLISHED = Path(__file__).parent / "published"
MASK, EOS, PAD, BLOCK = 60, 61, 62, 4


class Case(NamedTuple):
    """A published model."""

    name: str
    """On the hub."""
    family: str
    kind: str
    """Its class in transformers."""
    blocks: Blocks
    shift: int = 0
    reading: str = ""
    """What config.json and the tokenizer do not say of a small model."""


CASES = {
    "sdar": Case("SDAR-1.7B-Chat", "sdar", "Qwen3ForCausalLM", Blocks(BLOCK)),
    "sdar-moe": Case("SDAR-30B-A3B-Chat", "sdar", "Qwen3MoeForCausalLM", Blocks(BLOCK)),
    "fast-dllm-v2": Case(
        "Fast_dLLM_v2_7B",
        "fast-dllm-v2",
        "Qwen2ForCausalLM",
        Blocks(BLOCK, first_alone=True),
        shift=1,
        reading=",mask_id=60",
    ),
    "bd3lm": Case(
        "Qwen3-0.6B-diffusion-bd3lm-v0.1",
        "bd3lm",
        "Qwen3ForCausalLM",
        Blocks(BLOCK, "completion"),
        reading=",family=bd3lm,block_length=4",
    ),
    "stable-diffcoder": Case(
        "Stable-DiffCoder-8B-Instruct",
        "stable-diffcoder",
        "LlamaForCausalLM",
        Blocks(BLOCK, whole_last=False),
        reading=",mask_id=60",
    ),
    "nemotron-labs-diffusion": Case(
        "Nemotron-Labs-Diffusion-8B",
        "nemotron-labs-diffusion",
        "Ministral3ForCausalLM",
        Blocks(BLOCK, "completion", causal_context=True, first_alone=True),
    ),
}


class Published(NamedTuple):
    """A published model, loaded, and what its authors' code computes."""

    case: Case
    source: Path
    expected: dict
    policy: object


@pytest.fixture(scope="module", params=CASES)
def published(request, tmp_path_factory):
    case, source = CASES[request.param], PUBLISHED / request.param
    place = tmp_path_factory.mktemp("hub") / case.name
    place.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, place)
    save_tokenizer(place)
    expected = json.loads((source / "reference.json").read_text())
    return Published(case, source, expected, load_policy(f"{place}{case.reading}", "cpu"))


def of(*names):
    """These models alone."""
    return pytest.mark.parametrize("published", names, indirect=True)


def others(name):
    """All models but this one."""
    return of(*sorted(CASES.keys() - {name}))


def save_tokenizer(place):
    """A tokenizer of 64 tokens, the special ones where the models have them."""
    vocabulary = {chr(0x4E00 + number): number for number in range(64)}
    special = {"mask_token": MASK, "eos_token": EOS, "pad_token": PAD}
    names = {role: chr(0x4E00 + number) for role, number in special.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(place)


def close(ours, theirs):
    return float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@torch.no_grad()
def logits(policy, ids, attends=None):
    """Logits [T, V] as they come, whatever the shift."""
    return policy.logits(policy.hidden(torch.tensor([ids]), None, allowed=attends)[0])


# 1. What config.json says.


def test_its_family_class_and_blocks_are_recognised(published):
    case, policy = published.case, published.policy
    assert (policy.family, policy.shift) == (case.family, case.shift)
    assert policy.blocks == case.blocks
    assert (policy.mask_id, policy.eos_id) == (MASK, EOS)
    assert type(policy.model).__name__ == case.kind
    assert not policy.model.config.is_causal


def config_of(name):
    return json.loads((PUBLISHED / name / "config.json").read_text())


def test_blocks_that_nothing_states_are_asked_for():
    """Nothing in config.json: of SDAR's mixture the name says it, of A2D's models the user."""
    mixture = config_of("sdar-moe")
    with pytest.raises(DataError, match="how many tokens a block has: write MODEL,block_length=B"):
        architecture(mixture, "models/mine/config.json")
    for name, length in ("SDAR-30B-A3B-Chat", 4), ("SDAR-30B-A3B-Chat-b32", 32):
        assert architecture(mixture, f"JetLM/{name}/config.json").blocks == Blocks(length)
    with pytest.raises(DataError, match="write MODEL,family=bd3lm,block_length=32"):
        architecture(config_of("bd3lm"), f"{CASES['bd3lm'].name}/config.json")


@pytest.mark.parametrize("name", ["fast-dllm-v2", "stable-diffcoder", "nemotron-labs-diffusion"])
def test_the_mask_token_is_the_published_one_unless_config_json_says_otherwise(name):
    published = {"fast-dllm-v2": 151665, "stable-diffcoder": 5, "nemotron-labs-diffusion": 100}
    config = config_of(name)
    stated = config.pop("mask_token_id", None)
    assert architecture(config, "config.json").mask_id == published[name]
    if stated is not None:
        assert architecture(config_of(name), "config.json").mask_id == stated
    assert architecture(config, "config.json", Reading(mask_id=7)).mask_id == 7


# 2. Passes over whole texts.


def test_its_masks_and_logits_are_those_of_the_authors_code(published):
    for wanted in published.expected["forwards"]:
        policy, ids = published.policy, wanted["ids"]
        places = torch.arange(len(ids))[None]
        noised = torch.zeros_like(places, dtype=torch.bool)
        if wanted["kind"] == "block after causal prefix":  # Nemotron's own; the block is the end
            noised = places >= wanted["positions"][0]
        start = torch.tensor([wanted["prompt_length"]])
        attends = policy.blocks.attends(places, places, noised, noised, start)
        assert ["".join(str(int(seen)) for seen in row) for row in attends[0]] == wanted["attends"]
        ours = logits(policy, ids, attends)[wanted["positions"]]
        assert close(ours, torch.tensor(wanted["logits"]))


@others("bd3lm")  # its blocks depend on where the completion begins
def test_a_text_is_read_by_its_blocks_if_nothing_else_is_said(published):
    for wanted in published.expected["forwards"]:
        if wanted["kind"] != "block after causal prefix":
            ours = logits(published.policy, wanted["ids"])[wanted["positions"]]
            assert close(ours, torch.tensor(wanted["logits"]))


# 3. Greedy completions.


def firsts(blocks, prompt, length):
    """Blocks whose first token is decided alone.

    Fast-dLLM v2 and Nemotron take it from the pass that stores the keys of the block before, which
    their numbers of passes leave out. Here that pass is the block's first.
    """
    if not blocks.first_alone:
        return 0
    begin = -len(prompt) % blocks.length if blocks.origin == "text" else 0
    return len(range(begin, length, blocks.length))


def greedy(policy, prompts, length, settings, cache):
    sampler = Sampler(**{"gen_length": length, "cache": cache, **settings})
    return sample(policy, prompts, [0] * len(prompts), configured(policy, sampler))


@pytest.mark.parametrize("cache", [None, "none"], ids=["cache", "no cache"])
def test_its_greedy_completions_are_those_of_the_authors_sampler(published, cache):
    prompts = published.expected["prompts"]
    for run in published.expected["runs"] + published.expected.get("rounding_runs", []):
        policy = replace(published.policy, shift=run.get("shift", published.policy.shift))
        settings, completions = run["settings"], run["completions"]
        # Of Fast-dLLM v2 lengths differ: its number of blocks is given, not that of tokens.
        longest = max(map(len, completions))
        together = greedy(policy, prompts, longest, settings, cache)
        wanted = zip(prompts, completions, run["nfe"], together, strict=True)
        for prompt, completion, passes, in_batch in wanted:
            [alone] = greedy(policy, [prompt], len(completion), settings, cache)
            assert alone.tokens == in_batch.tokens[: len(completion)] == completion, settings
            assert alone.nfe == passes + firsts(policy.blocks, prompt, len(completion)), settings


@pytest.mark.parametrize("cache", [None, "none"], ids=["cache", "no cache"])
def test_a_completion_ends_with_the_block_that_ends_it(published, cache):
    """Their own stop, at a token that is in the completion; what follows it is cut."""
    prompts = published.expected["prompts"]
    for run in published.expected["stops"]:
        policy = replace(published.policy, eos_id=run["eos"], other_ends=frozenset())
        settings, prompt = {"early_stop": True, **run["settings"]}, prompts[run["prompt"]]
        [ours] = greedy(policy, [prompt], 12, settings, cache)
        assert ours.tokens[: policy.length(ours.tokens)] == run["completion"]
        # Fast-dLLM v2 and Nemotron do not finish the block.
        if not policy.blocks.first_alone:
            assert ours.nfe == run["nfe"]


# 4. Training: a clean and a noised copy of the text in one pass.


class Training(NamedTuple):
    """A pass of training by the authors' code, and the same here."""

    theirs: torch.Tensor
    """[N, V] at the masked tokens."""
    ours: torch.Tensor
    first: torch.Tensor
    """bool [N], first tokens of their block."""


def training(published):
    """The passes; dllm's trainer and Nemotron's count blocks from the text's beginning, unlike
    their samplers."""
    blocks = replace(published.policy.blocks, origin="text")
    policy = replace(published.policy, blocks=blocks)
    for wanted in published.expected["training"]:
        prompts, completions = wanted["prompts"], wanted["completions"]
        masked = [torch.tensor([sign == "1" for sign in row]) for row in wanted["masked"]]
        everything = [torch.ones_like(row) for row in masked]
        with torch.no_grad():
            scored = scored_states(policy, prompts, completions, masked, everything)
            ours = policy.logits(scored.states)
        starts = torch.tensor([len(prompt) for prompt in prompts])
        first = (scored.columns + starts[scored.rows]) % BLOCK == 0
        among = torch.cat(masked)
        yield Training(torch.tensor(wanted["logits"]), ours[among], first[among])


@others("stable-diffcoder")  # its training code is not public
def test_its_two_streams_are_those_of_the_authors_training(published):
    for theirs, ours, first in training(published):
        assert theirs.shape == ours.shape
        # Of these two training predicts a block's first token otherwise than sampling does; dlmctl
        # trains what it samples. See the next test.
        same = ~first if published.policy.blocks.first_alone else torch.ones_like(first)
        assert int(same.sum()) >= 2
        assert close(ours[same], theirs[same])


@of("fast-dllm-v2", "nemotron-labs-diffusion")
def test_in_their_training_a_first_token_is_predicted_in_the_noised_copy(published, monkeypatch):
    """By Fast-dLLM v2 from the token before it, noised; by Nemotron from itself."""
    passes = list(training(published))
    assert any(not close(p.ours[p.first], p.theirs[p.first]) for p in passes if any(p.first))
    monkeypatch.setattr(Blocks, "leads", lambda *_: None)
    for theirs, ours, _ in training(published):
        assert close(ours, theirs)


# 5. Saved again.


def test_saved_and_loaded_it_computes_the_same(published, tmp_path):
    policy, ids = published.policy, published.expected["forwards"][0]["ids"]
    save_policy(policy, tmp_path / "again")
    again = load_policy(str(tmp_path / "again"), "cpu")
    assert (again.family, again.shift, again.blocks) == (policy.family, policy.shift, policy.blocks)
    assert (again.mask_id, again.eos_id) == (MASK, EOS)
    assert torch.equal(logits(again, ids), logits(policy, ids))


def test_its_weights_have_the_authors_names_again(published, tmp_path):
    save_policy(published.policy, tmp_path / "again")
    family = published.policy.model_family
    saved = load_file(tmp_path / "again" / "model.safetensors")
    renamed = {family.original_name(name): tensor for name, tensor in saved.items()}
    wanted = load_file(published.source / "model.safetensors")
    assert renamed.keys() == wanted.keys()
    assert all(torch.equal(renamed[name], wanted[name]) for name in wanted)
    assert all(family.original_name(family.rename(name)) == name for name in wanted)
