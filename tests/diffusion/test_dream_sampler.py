"""Dream's sampler against completions that its authors' own code made, and its laws.

tests/diffusion/dream is a small Dream with random weights, saved by the authors' modeling
code; reference.json has its logits and the completions of its `diffusion_generate`.
"""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dlmctl.diffusion.autoregressive import sample_autoregressive
from dlmctl.diffusion.proposals import perturb, predict_tokens, select_to_unmask
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import (
    Request,
    SamplerConfig,
    configured,
    tokens_per_timestep,
    unmasking_probabilities,
)
from dlmctl.models.loading import load_policy
from dlmctl.settings.sampler import Sampler

PUBLISHED = Path(__file__).parent / "dream"
REFERENCE = json.loads((PUBLISHED / "reference.json").read_text())
REMASKING = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
"""Names of Dream's `alg`, and ours."""
PROMPT = [3, 4, 8]


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dream") / "model"
    shutil.copytree(PUBLISHED, directory)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    names = {"mask_token": "t60", "eos_token": "t61", "pad_token": "t61"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    return load_policy(str(directory), "cpu", "float32")


def test_logits_are_those_of_the_authors_model(dream):
    ids = torch.tensor([REFERENCE["ids"]])
    rows, positions = torch.ones_like(ids).nonzero(as_tuple=True)
    with torch.no_grad():
        logits = dream.predict(ids, None, rows, positions)
    torch.testing.assert_close(logits, torch.tensor(REFERENCE["logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alg", REMASKING)
def test_greedy_completions_are_token_for_token_those_of_diffusion_generate(dream, alg):
    compared, unlike = 0, set()
    for call in REFERENCE["calls"]:
        if call["alg"] != alg:
            continue
        options = {name: call.get(name) for name in ("steps", "top_p", "top_k")}
        length = REFERENCE["gen_length"]
        asked = Sampler(gen_length=length, remasking=REMASKING[alg], **options)
        ours = sample(dream, REFERENCE["prompts"], [0] * 4, configured(dream, asked))
        assert [s.tokens for s in ours] == call["completions"]
        assert [s.order for s in ours] == call["order"]
        compared += len(ours)
        for wrong in ({"schedule": "even"}, {"confidence_of": "model"}, {"block_length": 8}):
            other = configured(dream, Sampler(length, remasking=REMASKING[alg], **options, **wrong))
            if [s.order for s in sample(dream, REFERENCE["prompts"], [0] * 4, other)] != call[
                "order"
            ]:
                unlike |= wrong.keys()
    assert compared == 64
    assert unlike == {"schedule", "confidence_of", "block_length"}


def test_tokens_per_timestep_are_those_of_their_loop_in_float32():
    assert tokens_per_timestep(4, 2) == [1, 3]  # 4 (1 - 0.5005) is 1.998
    assert tokens_per_timestep(5, 1) == [5]
    for steps in (1, 2, 3, 5, 8, 13, 32, 64, 100, 500):
        times = torch.linspace(1, 1e-3, steps + 1)
        for length in (1, 2, 7, 16, 33, 64, 128, 700):
            left, theirs = torch.tensor(float(length)), []
            for t, s in itertools.pairwise(times[:-1]):
                theirs.append(int(left * (1 - s / t)))
                left = left - theirs[-1]
            assert tokens_per_timestep(length, steps) == [*theirs, int(left)]


def filtered(logits, temperature, top_p, top_k):
    """The distribution of Dream's sample_tokens, one token at a time."""
    p = (logits / temperature).softmax(0)
    order = sorted(range(len(p)), key=lambda v: -float(p[v]))
    kept, before = [], 0.0
    for v in order:
        if before <= top_p:
            kept.append(v)
        before += float(p[v])
    weights = torch.zeros_like(p)
    weights[kept[: top_k or None]] = p[kept[: top_k or None]]
    return weights / weights.sum()


def states_and_logits(policy, rows=1):
    """Hidden states [N, H] of the first masked position after `rows` prompts, and its logits."""
    prompts = torch.tensor([[3, 4, 3 + row % 5, policy.mask_id] for row in range(rows)])
    with torch.no_grad():
        states = policy.hidden(prompts, None)[:, policy.source(torch.tensor(3))]
        logits = policy.logits(states)
    return states, logits


@pytest.mark.parametrize("filters", [(0.8, 0), (1.0, 4), (0.9, 3), (0.0, 0)])
def test_a_token_is_drawn_from_the_tempered_and_filtered_distribution(filters):
    policy, draws = tiny_policy("dream"), 6000
    policy.model.lm_head.weight.data[policy.mask_id] = -10 * states_and_logits(policy)[0][0]
    states, logits = states_and_logits(policy)
    top_p, top_k = filters
    settings = SamplerConfig(1, 1, 1, 2.0, top_p=top_p, top_k=top_k)
    with torch.no_grad():
        many = [states.expand(draws, -1)]
        token, _ = predict_tokens(policy, many, torch.arange(draws), settings)
    expected = draws * filtered(logits[0], 2.0, top_p, top_k)
    counts = token.bincount(minlength=len(expected)).double()
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 1e-9
    assert degrees == {(0.8, 0): 3, (1.0, 4): 3, (0.9, 3): 2, (0.0, 0): 0}[filters]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("filters", [(1.0, 0), (0.8, 0), (0.9, 3)])
@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
def test_confidence_of_the_sampled_distribution(remasking, filters, temperature):
    policy = tiny_policy("dream")
    states, logits = states_and_logits(policy, 5)
    top_p, top_k = filters
    settings = SamplerConfig(
        1, 1, 1, temperature, top_p, top_k, remasking=remasking, confidence_of="sampled"
    )
    with torch.no_grad():
        token, sure = predict_tokens(policy, [states], torch.arange(5), settings)
    for row in range(5):
        p = filtered(logits[row], temperature or 1.0, top_p, top_k)
        best = p.topk(2).values
        expected = {
            "low_confidence": p[token[row]],
            "margin": best[0] - best[1],
            "entropy": torch.special.xlogy(p, p).sum(),
        }[remasking]
        torch.testing.assert_close(sure[row], expected, rtol=1e-9, atol=1e-12)


def test_if_the_filter_leaves_the_mask_token_alone_the_best_other_token_is_sampled():
    policy = tiny_policy("dream")
    policy.model.lm_head.weight.data[policy.mask_id] = 10 * states_and_logits(policy)[0][0]
    states, logits = states_and_logits(policy)
    assert int(logits.argmax()) == policy.mask_id
    logits[:, policy.mask_id] = -torch.inf
    with torch.no_grad():
        settings = SamplerConfig(1, 1, 1, 1.0, top_k=1, confidence_of="sampled")
        token, sure = predict_tokens(policy, [states], torch.arange(1), settings)
    assert token.tolist() == logits.argmax(1).tolist()
    assert 0 < float(sure) < 0.5


def test_alg_temp_draws_positions_without_replacement():
    """P({i, j}) by enumeration of the two orders of drawing i and j."""
    draws, settings = 6000, SamplerConfig(8, 8, 8, alg_temp=0.5)
    confidence = torch.tensor([-0.3, -1.5, -0.9, -0.1, -torch.inf], dtype=torch.float64)
    w = (confidence / 0.5).softmax(0)
    keys = torch.arange(4 * draws).view(draws, 4)
    ranking = confidence.expand(draws, -1).clone()
    ranking[:, :4] = perturb(confidence[:4].expand(draws, -1), keys, settings)
    stays = select_to_unmask(ranking, torch.full((draws,), 2), settings)
    counts = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in stays)
    assert sum(counts.values()) == draws
    for i, j in itertools.combinations(range(4), 2):
        p = float(w[i] * w[j] / (1 - w[i]) + w[j] * w[i] / (1 - w[j]))
        assert abs(counts[i, j] / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5
    assert all(4 not in pair for pair in counts)


def test_alg_temp_is_that_of_the_sampler_and_as_it_falls_the_most_confident_stay():
    policy = tiny_policy("dream")
    options = {"schedule": "timesteps", "remasking": "entropy", "confidence_of": "sampled"}
    plain = sample(policy, [PROMPT], [0], SamplerConfig(6, 6, 6, **options))
    cold = sample(policy, [PROMPT], [0], SamplerConfig(6, 6, 6, **options, alg_temp=1e-6))
    warm = [
        sample(policy, [PROMPT], [key], SamplerConfig(6, 6, 6, **options, alg_temp=10.0))[0]
        for key in range(20)
    ]
    assert plain == cold
    assert len({tuple(s.order) for s in warm}) > 10


def test_origin_decides_each_masked_token_with_probability_1_minus_s_over_t():
    """A token is left after a step to time s with probability s, whatever the others do."""
    policy, draws, steps = tiny_policy("dream"), 3000, 4
    settings = SamplerConfig(3, 3, steps, schedule="timesteps", remasking="random")
    samples = sample(policy, [PROMPT] * draws, list(range(draws)), settings)
    order = torch.tensor([s.order for s in samples])
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    p = -times.diff()
    p[-1] = times[-2]
    error = (p * (1 - p) / draws).sqrt()
    for position in range(3):
        share = order[:, position].bincount(minlength=steps) / draws
        assert bool(((share - p).abs() < 4 * error).all())
    together = float((order == 0).all(dim=1).double().mean())
    assert abs(together - float(p[0] ** 3)) < 4 * float(p[0] ** 3 / draws) ** 0.5
    assert float(unmasking_probabilities(steps)[0]) == pytest.approx(float(p[0]))
    assert {s.nfe for s in samples} == {1, 2, 3, 4}


def test_origin_decides_late_ends_in_the_last_step():
    policy = tiny_policy("dream")
    settings = SamplerConfig(12, 12, 6, 2.0, schedule="timesteps", remasking="random", eos="late")
    samples = sample(policy, [PROMPT] * 20, list(range(20)), settings)
    ends = [
        order
        for s in samples
        for token, order in zip(s.tokens, s.order, strict=True)
        if token in policy.ends
    ]
    assert set(ends) == {5}
    assert not any(policy.mask_id in s.tokens for s in samples)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.8, "top_k": 5, "confidence_of": "sampled", "remasking": "entropy"},
        {"schedule": "timesteps", "alg_temp": 0.5},
        {"schedule": "timesteps", "remasking": "random"},
    ],
)
def test_a_sample_does_not_depend_on_its_batch(options):
    policy = tiny_policy("dream")
    settings = SamplerConfig(8, 8, 6, 0.9, **options)
    prompts, keys = [PROMPT, [5, 8], [6] * 7, PROMPT], [1, 2, 3, 4]
    together = sample(policy, prompts, keys, settings)
    pairs = zip(prompts, keys, strict=True)
    assert together == [sample(policy, [p], [k], settings)[0] for p, k in pairs]
    assert together[0] != together[3]


def test_autoregressive_models_sample_from_the_filtered_distribution_too():
    policy, draws = tiny_policy("ar"), 3000
    settings = SamplerConfig(1, 1, 1, 0.8, top_p=0.9, top_k=4)
    requests = [Request(PROMPT, key) for key in range(draws)]
    made = list(sample_autoregressive(policy, requests, settings, draws))
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    p = filtered(logits, 0.8, 0.9, 4)
    share = torch.tensor([s.tokens[0] for s in made]).bincount(minlength=len(p)) / draws
    assert bool(((share - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all())
