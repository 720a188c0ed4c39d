"""What `dlmctl plan` computes is what the same code does where it can be run."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import HANGS, tiny_policy, tiny_vision_policy
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from dlmctl.bench.memory import CLEAR
from dlmctl.bench.shapes import SHAPES, bench_policy
from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.weightless import weightless_policy
from dlmctl.plan import footprint
from dlmctl.plan.flops import counts, denoising, left_to_right
from dlmctl.plan.footprint import (
    gradient_memory,
    kept_memory,
    sampling_memory,
    tower_memory,
    units,
)
from dlmctl.plan.live_memory import LiveMemory
from dlmctl.records.jsonl import Record
from dlmctl.rl.gradient import accumulate_gradient
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, passes_for, policy_gradients
from dlmctl.settings.algorithms import Reinforcement
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.lora import add_adapter
from dlmctl.train.optimizer import apply_step, make_optimizer, trained_parameters
from dlmctl.train.precision import training_precision

HERE = Path(__file__)
BIG = HERE.parents[2] / "examples" / "large"


def records(count=4, prompt=5, length=12):
    return [
        Record(
            id="a",
            sample=n,
            tokens={"prompt": [3] * prompt, "completion": [4 + (n + k) % 3 for k in range(length)]},
            advantage=1.0 if n % 2 else -1.0,
        )
        for n in range(count)
    ]


def weightless(policy):
    """The same model without its weights."""
    return dataclasses.replace(policy, model=copy.deepcopy(policy.model).to("meta"))


def random_policy(layers=4, hidden=64, vocabulary=500, dtype="float32"):
    SHAPES["test"] = {
        "vocab": vocabulary, "hidden": hidden, "inner": 3 * hidden, "layers": layers, "heads": 2,
    }  # fmt: skip
    return bench_policy("random:test", "cpu", dtype)


# --- published sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [("llada-8b", 8.02e9), ("dream-7b", 7.62e9), ("qwen2.5-vl-3b", 3.75e9)],
)
def test_the_shapes_in_the_examples_have_the_published_number_of_parameters(name, published):
    policy = weightless_policy(str(BIG / f"{name}.json"), torch.bfloat16)
    assert sum(p.numel() for p in policy.model.parameters()) == pytest.approx(published, rel=2e-3)
    assert all(p.is_meta for p in policy.model.parameters())


# --- bytes that stay -----------------------------------------------------------------------------


def size(tensors):
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_gradients_and_moments_are_those_of_a_step_to_the_byte(rank):
    policy = random_policy(dtype="bfloat16" if rank else "float32")
    if rank:
        policy = add_adapter(policy, Adapter(rank, 8.0))
    expected = kept_memory(weightless(policy), 1)
    examples = [example_of(record, policy, MaskPlan("full", 1)) for record in records()]
    accumulate_gradient(policy, examples, torch.ones(4, 1, 12, dtype=torch.float64), 4)
    trained = trained_parameters(policy.model)
    assert size(policy.model.parameters()) == expected.weights
    assert size(p.grad for p in trained.values()) == expected.gradients
    optimizer = make_optimizer(trained.values(), Optimizer())
    apply_step(optimizer, trained.values(), 1e-3, 1.0)
    states = [optimizer.state[p] for p in trained.values()]
    assert size(s[name] for s in states for name in ("exp_avg", "exp_avg_sq")) == expected.moments


def rank_report(number, port, results):
    """A gradient on one of two ranks: bytes of its shards, and of what it was sent."""
    import torch.distributed as dist

    from dlmctl.train.distributed import joined
    from dlmctl.train.sharding import shard

    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    moved = {"gather": 0, "scatter": 0}

    def watched(kind, run, whole):
        def call(*args, **kwargs):
            bound = {**dict(zip(("output", "input"), args, strict=False)), **kwargs}
            tensor = next(v for k, v in bound.items() if k.startswith(whole))
            moved[kind] += tensor.numel() * tensor.itemsize // 2
            return run(*args, **kwargs)

        return call

    for kind, whole, names in (
        ("gather", "output", ("all_gather_single", "all_gather_into_tensor")),
        ("scatter", "input", ("reduce_scatter_single", "reduce_scatter_tensor")),
    ):
        name = next(name for name in names if hasattr(dist, name))  # the first in newer torch
        setattr(dist, name, watched(kind, getattr(dist, name), whole))
    with joined("cpu"):
        policy = random_policy(layers=2, vocabulary=501)
        shard(policy)
        examples = [example_of(record, policy, MaskPlan("full", 2)) for record in records()]
        log_probs(policy, examples, 2)
        scored = dict(moved)
        accumulate_gradient(policy, examples, torch.ones(4, 2, 12, dtype=torch.float64), 2)
        trained = trained_parameters(policy.model)
        optimizer = make_optimizer(trained.values(), Optimizer())
        apply_step(optimizer, trained.values(), 1e-3, 1.0)
        states = [optimizer.state[p] for p in trained.values()]
        results.put({
            "rank": number,
            "weights": size(p.to_local() for p in trained.values()),
            "moments": size(
                s[name].to_local() for s in states for name in ("exp_avg", "exp_avg_sq")
            ),
            "scored": scored,
            "moved": moved,
        })  # fmt: skip


def test_shards_and_traffic_of_two_ranks_are_as_planned(unused_port):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=rank_report, args=(n, unused_port, results)) for n in range(2)]
    for process in ranks:
        process.start()
    first, second = sorted((results.get(timeout=HANGS) for _ in ranks), key=lambda r: r["rank"])
    for process in ranks:
        process.join(HANGS)
    whole = weightless(random_policy(layers=2, vocabulary=501))
    expected, moves = kept_memory(whole, 2), units(whole, 2)
    assert first["weights"] == expected.weights
    assert first["moments"] == expected.moments
    assert first["weights"] + second["weights"] == kept_memory(whole, 1).weights
    weights = (moves.root + sum(moves.blocks)) // 2
    gradients = (moves.root_gradients + sum(moves.gradients)) // 2
    batches = 2  # 4 completions with 2 masks, in twos, on 2 ranks
    assert first["scored"] == {"gather": batches * weights, "scatter": 0}
    assert first["moved"]["gather"] == batches * (1 + 2) * weights
    assert first["moved"]["scatter"] == batches * gradients


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- bytes that come and go ----------------------------------------------------------------------

ROWS, LENGTH, SCORED = 2, 192, 96
CASES = [(0, False, "float32"), (4, False, "bfloat16"), (0, True, "bfloat16")]


def resident_peaks():
    """Megabytes of a gradient as the system sees them, as its tensors have them, as planned."""
    from dlmctl.bench.memory import Peak

    for rank, recomputes, dtype in CASES:
        policy = random_policy(6, 256, 1000, dtype if rank else "float32")
        if rank:
            policy = add_adapter(policy, Adapter(rank, 8.0))
        if recomputes:
            checkpoint_activations(policy.core)
        given = records(2, LENGTH - SCORED, SCORED)
        examples = [example_of(record, policy, MaskPlan("full", ROWS)) for record in given]
        compute = getattr(torch, dtype)

        def step(policy=policy, examples=examples, compute=compute):
            with training_precision(policy, compute):
                log_probs(policy, examples, ROWS)
                ones = torch.ones(2, ROWS, SCORED, dtype=torch.float64)
                accumulate_gradient(policy, examples, ones, ROWS)

        step()  # gradients are there from the second micro-batch on
        with Peak(policy.device) as peak:
            step()
        with LiveMemory() as live:
            step()
        planned = gradient_memory(weightless(policy), ROWS, LENGTH, SCORED, compute)
        print(json.dumps([peak.megabytes, live.peak / 1e6, planned.total / 1e6]))

    policy, settings = (
        random_policy(8, 128, 4000),
        SamplerConfig(gen_length=64, steps=2, temperature=1.0),
    )
    prompts, keys = [[3] * 64] * 16, list(range(16))
    sample(policy, prompts, keys, settings)
    with Peak(policy.device) as peak:
        sample(policy, prompts, keys, settings)
    with LiveMemory() as live:
        sample(policy, prompts, keys, settings)
    _, planned = sampling_memory(weightless(policy), settings, 16, 64)
    print(json.dumps([peak.megabytes, live.peak / 1e6, planned.total / 1e6]))


@pytest.mark.skipif(not CLEAR.exists(), reason="no resident set to measure here")
def test_the_memory_of_gradients_and_of_sampling_is_as_planned():
    # Every tensor is a mapping of its own, so that what is resident is what is alive.
    settings = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
    path = f"{HERE.parent}:{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", "import test_plan; test_plan.resident_peaks()"],
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for case, (resident, alive, planned) in zip([*CASES, "sampling"], lines, strict=True):
        assert planned == pytest.approx(alive, rel=0.02), case
        # Up to three megabytes are the libraries' own.
        assert planned == pytest.approx(resident, rel=0.05, abs=3), case


def test_a_few_blocks_tell_what_all_of_them_need(monkeypatch):
    policy = add_adapter(weightless(random_policy(layers=8)), Adapter(2, 8.0))
    checkpoint_activations(policy.core)

    def needed():
        return gradient_memory(policy, 2, 40, 30, torch.bfloat16).total

    few = needed()
    monkeypatch.setattr(footprint, "FEW", (3, 99))
    assert few == pytest.approx(needed(), rel=1e-6)


# --- operations ----------------------------------------------------------------------------------


def counted(work):
    """Operations of a piece of work.

    The CPU's fused attention counts as that of GPUs, and a product that is added in place as any.
    """
    aten = torch.ops.aten

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, query, key, value)

    def added(into, left, right, *args, out_shape=None, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    fused = {
        aten.addmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("rank", "recomputes"), [(0, False), (0, True), (4, False)])
def test_operations_of_a_step_are_counted_within_two_percent(rank, recomputes):
    policy, reference = random_policy(layers=8), random_policy(layers=8)
    if rank:
        policy = add_adapter(policy, Adapter(rank, 8.0))
    if recomputes:
        checkpoint_activations(policy.core)
    objective, plan = make_objective("rspo"), MaskPlan("full", 2)
    frozen = Reference("r", lambda examples: log_probs(reference, examples, 4))

    def step():
        list(policy_gradients(policy, frozen, [records()], objective, Batching(plan), 4))

    found, other = counts(policy, recomputes), counts(reference, False)
    rows, length, scored = 4 * 2, 5 + 12, 12
    assert passes_for(objective, 1, False) == (1, 1, 1)
    planned = rows * (found.scoring(length, scored) + other.scoring(length, scored))
    planned += rows * found.gradient(length, scored)
    # An adapter's first block is not asked for the gradient by its inputs.
    assert planned == pytest.approx(counted(step), rel=0.02 if rank else 1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llada", {}),
        ("dream", {"cache": "dual"}),
        ("llada", {"cache": "prefix", "refresh": 3}),
        ("a2d", {"cfg_scale": 1.0}),
        ("sdar", {"cache": "exact"}),
        ("sdar", {}),
        ("bd3lm", {"cache": "exact"}),
        ("sdar", {"cache": "exact", "edit_threshold": 0.0, "edit_steps": 1}),
        ("dream", {"schedule": "timesteps", "steps": 24}),
    ],
)
def test_operations_of_sampling_are_those_of_the_sampler(family, options):
    policy = tiny_policy(family, layers=4)
    settings = SamplerConfig(**{"gen_length": 12, "block_length": 4, "steps": 6, **options})
    prompt = [3, 4, 5, 6, 7]
    planned = denoising(counts(policy, False), settings, len(prompt), policy.shift, policy.blocks)
    assert planned == pytest.approx(
        counted(lambda: sample(policy, [prompt], [1], settings)), rel=0.01
    )


def test_operations_of_an_autoregressive_model_are_those_of_its_sampler():
    from dlmctl.diffusion.autoregressive import sample_autoregressive
    from dlmctl.diffusion.sampling import Request

    policy = dataclasses.replace(tiny_policy("ar", layers=4), eos_id=None)
    planned = left_to_right(counts(policy, False), 12, 5)
    requests = [Request([3, 4, 5, 6, 7], 1)]
    settings = SamplerConfig(gen_length=12, steps=12)
    made = counted(lambda: list(sample_autoregressive(policy, requests, settings, 1)))
    assert planned == pytest.approx(made, rel=0.01)


def test_operations_of_an_image_are_those_of_the_tower():
    policy = tiny_vision_policy()
    tower = policy.core.model.visual
    grid = torch.tensor([[1, 8, 12]])
    pixels = torch.zeros(96, tower.patch_embed.proj.weight[0].numel(), dtype=torch.float64)
    made = counted(lambda: tower(pixels, grid_thw=grid))
    assert counts(policy, False).images(24, False) == pytest.approx(made, rel=0.1)


def test_a_vision_tower_keeps_about_what_a_llama_of_its_shape_does():
    policy = tiny_vision_policy()
    policy.model.float()
    grid, pixels = torch.tensor([[1, 16, 16]]), torch.zeros(256, 1176)
    with LiveMemory() as live:
        seen = policy.core.model.visual(pixels, grid_thw=grid)
        kept = live.now
    assert seen is not None
    planned = tower_memory(weightless(policy), 256, True, torch.float32)
    assert planned == pytest.approx(kept, rel=0.2)


@pytest.mark.parametrize(
    ("algo", "family"),
    [*((algo, "llada") for algo in sorted(get_args(Reinforcement))), ("grpo", "ar")],
)
def test_every_algorithm_takes_the_passes_that_are_planned(algo, family):
    policy, given = tiny_policy(family), records()
    for record in given:
        record["weights"] = [1.0] * 12
        record["rollout"] = {"log_probs": [-1.0] * 12}
    objective = make_objective(algo)
    inner = min(2, objective.recipe.inner)
    seen = {"policy": 0, "reference": 0, "gradient": 0}

    def score(examples):
        seen["reference"] += 1
        return torch.zeros(4, 2, 12, dtype=torch.float64)

    def hook(module, inputs, output):
        seen["gradient" if torch.is_grad_enabled() else "policy"] += 1

    policy.model.model.register_forward_hook(hook)
    batching = Batching(MaskPlan("complementary", 2), inner=inner)
    list(policy_gradients(policy, Reference("r", score), [given], objective, batching, 99))
    assert tuple(seen.values()) == passes_for(objective, inner, family == "ar")
