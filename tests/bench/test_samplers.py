"""`bench rollout` compares like with like."""

import inspect

import pytest
from conftest import shell, tiny_policy

from dlmctl.bench.memory import CLEAR, Peak
from dlmctl.bench.reference import plain_sample
from dlmctl.bench.rollout import compare_samplers, sampler_paths, usual_paths
from dlmctl.bench.shapes import bench_policy, random_prompts
from dlmctl.cli import functions
from dlmctl.diffusion.sampler import sample, sample_stream
from dlmctl.diffusion.sampling import Request, SamplerConfig
from dlmctl.records.errors import UsageError
from dlmctl.settings.bench import SamplerPaths
from dlmctl.settings.sampler import SAMPLED


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_plain_sampler_draws_the_tokens_of_the_fast_one(family, temperature):
    policy = tiny_policy(family)
    settings = SamplerConfig(10, 4, 6, temperature=temperature)
    prompts, keys = [[3, 4, 8], [5, 8], [6] * 7], [1, 2, 3]
    fast = sample(policy, prompts, keys, settings)
    for prompt, key, ours in zip(prompts, keys, fast, strict=True):
        assert plain_sample(policy, Request(prompt, key), settings) == ours.tokens


def test_rows_are_those_of_the_reference_and_the_chosen_paths():
    policy = bench_policy("random:tiny", "cpu", "float32")
    requests = [Request(p, n) for n, p in enumerate(random_prompts(policy, 6, 4, 20))]
    exact = SamplerConfig(16, 8, 16, temperature=SAMPLED.temperature)
    known = sampler_paths(
        policy, SamplerPaths(gen_length=16, block_length=8, steps=16, threshold=0.0)
    )
    assert known["exact"] == exact
    paths = {name: known[name] for name in ("exact", "threshold")}
    rows = list(compare_samplers(policy, requests, exact, paths, 4, 3, lambda tokens: 0.25))
    assert [row["path"] for row in rows] == ["reference", "exact", "threshold"]
    assert [row["completions"] for row in rows] == [3, 6, 6]
    assert [row["nfe"] for row in rows] == [16, 16, 2]
    assert [row["same"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[2]["same"] < 1
    assert [row.get("accuracy") for row in rows] == [None, 0.25, 0.25]
    for row in rows:
        speed = row["completions"] * 16 / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(speed)
        assert row["ratio"] == pytest.approx(speed / rows[0]["tokens_per_second"])


def test_paths_by_confidence_take_the_passes_they_need():
    policy = bench_policy("random:tiny", "cpu", "float32")
    requests = [Request(p, n) for n, p in enumerate(random_prompts(policy, 6, 4, 20))]
    exact = SamplerConfig(16, 8, 5)
    known = sampler_paths(policy, SamplerPaths(gen_length=16, block_length=8, steps=5, factor=0.0))
    paths = {name: known[name] for name in ("dual", "dual+threshold", "dual+factor")}
    nfe = [row["nfe"] for row in compare_samplers(policy, requests, exact, paths, 4, 3)]
    assert nfe[:2] == [4, 4]  # two for each block
    assert 4 < nfe[2] <= nfe[3] == 14  # at a factor of 0 the last two of a block go together


def test_the_defaults_are_those_of_rollout():
    def defaults(name):
        parameters = inspect.signature(functions(name.split()[0])[name]).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters}

    bench, rollout = defaults("bench rollout"), defaults("rollout")
    shared = ("gen_length", "block_length", "steps", "refresh", "refresh_below", "batch_size")
    for name in ("temperature", *shared, "seed", "device", "dtype"):
        assert bench[name] == rollout[name], name
    assert bench["temperature"] > 0
    policy = bench_policy("random:tiny", "cpu", "float32")
    requests = [Request(p, n) for n, p in enumerate(random_prompts(policy, 4, 4, 20))]
    known = sampler_paths(policy, SamplerPaths(gen_length=16))
    rows = compare_samplers(policy, requests, known["exact"], {"exact": known["exact"]}, 4, 2)
    assert [row["same"] for row in rows] == [1.0, 1.0]
    greedy = sampler_paths(policy, SamplerPaths(gen_length=16, temperature=0.0))["exact"]
    drawn, likeliest = (
        [sample.tokens for sample in sample_stream(policy, requests, config, 4)]
        for config in (known["exact"], greedy)
    )
    assert drawn != likeliest


def test_of_a_block_causal_model_the_exact_cache_is_compared_with_none():
    policy = tiny_policy("bd3lm")
    requests = [Request([3, 4, 8], 1), Request([5, 8], 2)]
    known = sampler_paths(policy, SamplerPaths(gen_length=8))
    paths = {name: known[name] for name in usual_paths(policy).split(",")}
    rows = list(compare_samplers(policy, requests, known["exact"], paths, 2, 3))
    assert [row["path"] for row in rows] == ["uncached", "exact", "threshold"]
    assert [row["same"] for row in rows[:2]] == [1.0, 1.0]
    assert [row["nfe"] for row in rows[:2]] == [8, 8]


def test_a_random_model_is_sure_of_some_tokens_and_not_of_others():
    policy = bench_policy("random:tiny", "cpu", "float32")
    requests = random_prompts(policy, 8, 4, 40)
    assert [len(p) for p in requests][::7] == [4, 40]
    passes = [
        sum(s.nfe for s in sample(policy, requests, list(range(8)), SamplerConfig(32, 32, **way)))
        for way in ({"threshold": 0.0}, {"threshold": 0.6}, {})
    ]
    assert passes[0] < passes[1] < passes[2]
    with pytest.raises(UsageError, match="no shape"):
        bench_policy("random:9t", "cpu", "float32")


@pytest.mark.skipif(not CLEAR.exists(), reason="resident memory is read from Linux")
def test_a_peak_is_what_the_work_needs_for_a_moment():
    import torch

    with Peak(torch.device("cpu")) as peak:
        held = torch.ones(25_000_000)
        del held
    assert 95 < peak.megabytes < 140


def test_the_command_measures_a_model_on_prompts(tmp_path):
    line = "dlmctl bench rollout -m builtin:puzzles --paths exact,dual -"
    done = shell(f"dlmctl prompts sudoku -n 4 | {line}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"accuracy"') == 2
