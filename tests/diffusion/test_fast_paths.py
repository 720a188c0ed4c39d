"""What makes sampling faster, against sampling without it."""

import pytest
import torch
from conftest import tiny_policy
from transformers import DynamicCache

from dlmctl.diffusion import sampler
from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.passes import SMALL_PASS, buckets
from dlmctl.diffusion.proposals import predict_tokens
from dlmctl.diffusion.sampler import sample, sample_stream
from dlmctl.diffusion.sampling import Request, SamplerConfig
from dlmctl.models.policy import cache_argument
from dlmctl.records.errors import DataError, UnavailableError, UsageError

PROMPTS = [[3, 4, 8], [5, 8], [6] * 7, [3, 4, 8], [4, 8, 3, 6, 5]]
DECODERS = ["llada", "dream", "a2d"]
WAYS = [{}, {"threshold": 0.1}, {"factor": 1.9}, {"cache": "prefix"}, {"cache": "dual"}]


def test_results_do_not_depend_on_how_many_are_under_way_and_keep_their_order():
    policy = tiny_policy()
    requests = [Request(p, key) for key, p in enumerate(PROMPTS * 3)]
    for way in WAYS:
        settings = SamplerConfig(12, 4, temperature=0.9, early_stop=True, **way)
        alone = [sample(policy, [r.prompt], [r.key], settings)[0] for r in requests]
        for batch_size in (1, 4, 15, 40):
            assert list(sample_stream(policy, requests, settings, batch_size)) == alone


class Asking(SamplerCallback):
    """Has a say in every step, so that every masked token is predicted; says nothing."""

    def adjust_confidence(self, targets, states, confidence):
        return confidence


IN_RANDOM_ORDER = [
    *WAYS[:2], *WAYS[3:], {"steps": 5, "schedule": "timesteps", "block_length": 12},
    {"steps": 6}, {"top_p": 0.7}, {"eos": "never"},
    {"eos": "late"}, {"cfg_scale": 1.0}, {"early_stop": True},
]  # fmt: skip


NOT_BY_BLOCKS = {"cache", "schedule", "cfg_scale"}


@pytest.mark.parametrize(
    ("family", "way"),
    [("llada", way) for way in IN_RANDOM_ORDER]
    + [("sdar", way) for way in IN_RANDOM_ORDER if NOT_BY_BLOCKS.isdisjoint(way)],
    ids=str,
)
def test_in_random_order_only_tokens_that_stay_are_predicted(family, way, monkeypatch):
    policy, predicted = tiny_policy(family), []
    options = {"gen_length": 12, "block_length": 4, "temperature": 0.9, **way}
    settings = SamplerConfig(remasking="random", **options)

    def counted(policy, states, keys, settings):
        predicted.append(len(keys))
        return predict_tokens(policy, states, keys, settings)

    monkeypatch.setattr(sampler, "predict_tokens", counted)
    requests = [Request(p, key) for key, p in enumerate(PROMPTS)]
    few = list(sample_stream(policy, requests, settings, 4))
    count = sum(predicted)
    assert few == list(sample_stream(policy, requests, settings, 4, Asking()))
    everything = sum(predicted) - count
    if way == {"eos": "late"}:
        assert count == everything
    elif family == "sdar" or "early_stop" in way:
        # Not all that is decided is given out: the last block is sampled whole.
        assert count < everything
    else:
        assert count == sum(len(x.order) for x in few) < everything


def test_requests_are_taken_only_as_places_become_free():
    policy, taken = tiny_policy(), []

    def requests():
        for number in range(20):
            taken.append(number)
            yield Request(PROMPTS[0], number)

    samples = sample_stream(policy, requests(), SamplerConfig(4, 4, 4), 3)
    next(samples)
    assert len(taken) == 3


def test_what_is_under_way_is_given_out_before_a_request_that_fails():
    def requests():
        yield Request(PROMPTS[0], 1)
        yield Request(PROMPTS[1], 2)
        raise DataError("the third line is broken")

    policy, settings, given = tiny_policy(), SamplerConfig(4, 4, 4), []
    samples = sample_stream(policy, requests(), settings, 8)
    given += [next(samples), next(samples)]
    with pytest.raises(DataError, match="third"):
        next(samples)
    assert given == sample(policy, PROMPTS[:2], [1, 2], settings)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_is_renewed_in_each_step_changes_nothing(family, cache):
    policy = tiny_policy(family)
    exact = SamplerConfig(12, 4, 12, temperature=0.7)
    cached = SamplerConfig(12, 4, 12, temperature=0.7, cache=cache, refresh=1)
    keys = list(range(5))
    assert sample(policy, PROMPTS, keys, cached) == sample(policy, PROMPTS, keys, exact)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_step_that_is_never_sure_enough_is_taken_again_exactly(family, cache):
    """A random model is never sure, so every step but a block's first takes two passes."""
    policy = tiny_policy(family)
    exact = SamplerConfig(12, 4, 12, temperature=0.7)
    careful = SamplerConfig(12, 4, 12, temperature=0.7, cache=cache, refresh_below=1.0)
    keys = list(range(5))
    ours, theirs = sample(policy, PROMPTS, keys, careful), sample(policy, PROMPTS, keys, exact)
    assert [(x.tokens, x.order) for x in ours] == [(x.tokens, x.order) for x in theirs]
    assert {x.nfe for x in ours} == {12 + 9}


def test_only_rows_that_are_unsure_pass_over_their_whole_sequence_again():
    policy = tiny_policy(layers=3, seed=5)
    between = [
        {x.nfe for x in sample(policy, PROMPTS, list(range(5)), settings)}
        for settings in (
            SamplerConfig(12, 4, 12, cache="dual", refresh_below=bound)
            for bound in (0.0, 0.05, 1.0)
        )
    ]
    assert between[0] == {12}
    assert between[2] == {21}
    assert all(12 <= nfe <= 21 for nfe in between[1])
    alone = SamplerConfig(12, 4, 12, cache="dual", refresh_below=0.05)
    for number, key in enumerate(range(5)):
        together = sample(policy, PROMPTS, list(range(5)), alone)[number]
        assert sample(policy, [PROMPTS[number]], [key], alone) == [together]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_one_layer_keys_of_other_tokens_do_not_change_and_a_cache_is_exact(family, cache):
    """In the first layer they come from embeddings, and only the block's own tokens change."""
    policy = tiny_policy(family, layers=1)
    exact = SamplerConfig(12, 4, 12, temperature=0.7)
    cached = SamplerConfig(12, 4, 12, temperature=0.7, cache=cache)
    keys = list(range(5))
    assert sample(policy, PROMPTS, keys, cached) == sample(policy, PROMPTS, keys, exact)


@torch.no_grad()
def with_prefix_of_transformers(policy, prompt, gen_length, block_length):
    """Greedy, one token a step, the tokens before the block in transformers' own cache."""
    mask, shift = policy.mask_id, policy.shift
    x = torch.tensor([[*prompt, *[mask] * gen_length]])
    for start in range(len(prompt), x.shape[1], block_length):
        past = DynamicCache(config=policy.model.config)
        given = {cache_argument(policy.model): past}
        logits = policy.model(input_ids=x, use_cache=True, **given).logits[0]
        first = start - shift
        for step in range(block_length):
            if step:
                past.crop(first - past.get_seq_length())
                logits = policy.model(input_ids=x[:, first:], use_cache=True, **given).logits[0]
                logits = torch.cat([logits.new_zeros(first, logits.shape[1]), logits])
            of_block = logits[first : first + block_length].double()
            p = of_block.softmax(-1)
            of_block[:, mask] = -torch.inf
            token = of_block.argmax(-1)
            sure = p.gather(1, token[:, None])[:, 0]
            sure[x[0, start : start + block_length] != mask] = -1
            best = int(sure.argmax())
            x[0, start + best] = token[best]
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_cache_is_that_of_transformers(family):
    policy = tiny_policy(family, layers=3, seed=5)
    settings = SamplerConfig(12, 4, 12, cache="prefix")
    exact, differs = SamplerConfig(12, 4, 12), False
    for prompt in PROMPTS[:3]:
        [ours] = sample(policy, [prompt], [0], settings)
        assert ours.tokens == with_prefix_of_transformers(policy, prompt, 12, 4)
        differs |= ours.tokens != sample(policy, [prompt], [0], exact)[0].tokens
        assert ours.nfe == 12


@pytest.mark.parametrize("family", DECODERS)
def test_a_dual_cache_passes_over_the_block_alone(family):
    policy, seen = tiny_policy(family), []
    body = getattr(policy.core, policy.core.base_model_prefix)
    body.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    sample(policy, [[5, 8, 3]], [0], SamplerConfig(8, 4, 8, cache="dual"))
    part = 4 + policy.shift
    assert seen == [11, part, part, part, 11, part, part, part]


def test_a_cache_wants_a_decoder_and_no_guidance():
    with pytest.raises(UsageError, match="--cache is for"):
        sample(tiny_policy("mlm"), PROMPTS, list(range(5)), SamplerConfig(4, 4, 4, cache="dual"))
    with pytest.raises(UsageError, match="--cfg-scale"):
        SamplerConfig(4, 4, 4, cache="dual", cfg_scale=1.0)
    with pytest.raises(UsageError, match="--refresh"):
        SamplerConfig(4, 4, 4, refresh=2)
    with pytest.raises(UsageError, match="--refresh-below says"):
        SamplerConfig(4, 4, 4, refresh_below=0.9)
    with pytest.raises(UsageError, match="--remasking entropy"):
        SamplerConfig(4, 4, 4, cache="dual", refresh_below=0.9, remasking="entropy")


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "margin"])
def test_confidences_in_float32_rank_as_in_float64_where_p_rounds_to_one(remasking):
    """20 positions that the model is sure of to 1e-9 and less: in float32 p is 1 for all."""
    policy = tiny_policy()
    head = torch.nn.Linear(4, policy.vocab_size, bias=False)
    policy.model.lm_head = head.float()
    states = 30 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(20)
    logits = head(states).detach()
    logits[:, policy.mask_id] = -torch.inf
    p = head(states).detach().double().softmax(-1)
    best = p.topk(2).values
    exact = {
        "low_confidence": p.gather(1, logits.argmax(1, keepdim=True))[:, 0],
        "entropy": torch.special.xlogy(p, p).sum(1),
        "margin": best[:, 0] - best[:, 1],
    }[remasking]
    with torch.no_grad():
        token, sure = predict_tokens(
            policy, [states], keys, SamplerConfig(4, 4, 4, remasking=remasking)
        )
    assert torch.equal(token, logits.argmax(1))
    torch.testing.assert_close(sure, exact, rtol=1e-5, atol=1e-9)


def test_rows_of_like_length_share_a_pass():
    def runs(lengths):
        return [(b.start, b.stop) for b in buckets(lengths)]

    assert runs([]) == []
    assert runs([9, 8, 3]) == [(0, 3)]  # too small to split
    many = SMALL_PASS // 256
    assert runs([256] * many + [255, 225] + [223] * many + [10]) == [
        (0, many + 2),
        (many + 2, 2 * many + 3),
    ]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_compiled_model_draws_the_same_tokens_with_few_graphs(cache, monkeypatch):
    # The graph is captured as for the real compiler, which would take half a minute for each.
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("dlmctl.models.compiled.COMPILER", compiler)
    policy = tiny_policy("dream", layers=6)
    exact = SamplerConfig(12, 4, 12, temperature=0.7, cache=cache)
    compiled = SamplerConfig(12, 4, 12, temperature=0.7, cache=cache, compile=True)
    keys = list(range(5))
    want = sample(policy, PROMPTS, keys, exact)
    assert sample(policy, PROMPTS, keys, compiled) == want
    # All six layers share theirs: with and without a mask, or that of an MLP and that of norms.
    assert 0 < len(graphs) < 6
    seen = len(graphs)
    assert sample(policy, PROMPTS, keys, exact) == want
    assert len(graphs) == seen
    assert not any("forward" in module.__dict__ for module in policy.model.modules())


def test_without_a_compiler_compile_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("dlmctl.models.compiled.which", lambda name: None)
    with pytest.raises(UnavailableError, match="needs a C\\+\\+ compiler"):
        sample(tiny_policy("llada"), PROMPTS, list(range(5)), SamplerConfig(4, 4, 4, compile=True))
