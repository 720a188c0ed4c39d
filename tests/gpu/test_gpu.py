"""What only a GPU can show: it computes what the CPU does, and says so when its memory is full.

`tests/mirrored/test_gpu_tests.py` runs these tests on a device that is not there.
"""

import gc

import pytest
import torch
from conftest import invoke, read_jsonl
from safetensors.torch import load_file

from dlmctl.diffusion import draws, noise
from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.memorization.images.neighbours import nearest
from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.records.jsonl import Record, dump
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients

pytestmark = pytest.mark.cuda
MODEL = "builtin:puzzles"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "prompts.jsonl"
    assert invoke("prompts", "sudoku", "-n", 4, "-o", path).exit_code == 0
    return path


def rollout(prompts, target, device, *options):
    return invoke(
        "rollout",
        prompts,
        "-n",
        2,
        "--device",
        device,
        "--dtype",
        "float32",
        "-o",
        target,
        *options,
    )


@pytest.mark.parametrize(("temperature", "cache"), [(0, "none"), (0.9, "none"), (0.9, "dual")])
def test_completions_are_those_of_the_cpu(prompts, tmp_path, temperature, cache):
    tokens = {}
    for device in ("cpu", "cuda"):
        target = tmp_path / device
        done = rollout(prompts, target, device, "--temperature", temperature, "--cache", cache)
        assert done.exit_code == 0, done.output
        tokens[device] = [record["tokens"]["completion"] for record in read_jsonl(target)]
    assert tokens["cuda"] == tokens["cpu"]


def rspo_gradient(device):
    """Loss and gradient of a group of four, whose reference has other weights."""
    policy, other = (load_policy(MODEL, device, "float32") for _ in range(2))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.02)
    group = [Record(id="p", sample=n, reward=float(n % 2)) for n in range(4)]
    for record in group:
        ids = [5 + (record["sample"] + i) % 9 for i in range(12)]
        record["tokens"] = {"prompt": ids[:4], "completion": ids[4:]}
    frozen = Reference("reference", lambda examples: log_probs(other, examples, 8))
    batching, objective = Batching(MaskPlan()), make_objective("rspo")
    [metrics] = policy_gradients(policy, frozen, [group], objective, batching, 8)
    parameters = [p for p in policy.model.parameters() if p.grad is not None]
    assert all(p.device.type == device for p in parameters)
    return metrics["loss"], torch.cat([p.grad.flatten().cpu() for p in parameters])


def test_a_gradient_of_rspo_is_that_of_the_cpu():
    (loss, gradient), (made_loss, made) = rspo_gradient("cpu"), rspo_gradient("cuda")
    assert made_loss == pytest.approx(loss, rel=1e-4)
    assert gradient.norm() > 0.1
    assert (made - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("memory", [2**16, 2**29])
def test_neighbours_are_those_of_the_cpu(memory):
    references = random(400, 64)
    samples = torch.cat([references[::4] + 1e-5 * random(100, 64, seed=1), random(50, 64, seed=2)])
    expected = nearest(samples, references, 3, memory)
    made = nearest(samples.to("cuda"), references.to("cuda"), 3, memory)
    assert made.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(made.distances.cpu(), expected.distances, rtol=1e-6, atol=0)


def test_noise_has_the_bits_of_the_cpu():
    keys, counters = torch.tensor([[3], [-(2**62)]]), torch.arange(-500, 500)
    logits = random(2, 5000, seed=3)  # of which a CPU makes the noise of few
    on_gpu = keys.to("cuda"), counters.to("cuda")
    for draw in (noise.random_bits, noise.uniform):
        assert torch.equal(draw(*on_gpu).cpu(), draw(keys, counters))
    torch.testing.assert_close(noise.gumbel(*on_gpu).cpu(), noise.gumbel(keys, counters))
    drawn = draws.gumbel_max(logits.to("cuda"), on_gpu[0][:, 0], 0.9)
    assert drawn.tolist() == draws.gumbel_max(logits, keys[:, 0], 0.9).tolist()


def test_the_weights_of_a_checkpoint_take_the_place_of_those_on_the_gpu(saved_models, tmp_path):
    name = saved_models("llada")
    policy = load_policy(name, "cuda", "float32")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    weights = reload_policy(policy, name, "cuda", "float32").model.state_dict()
    for key, expected in load_policy(name, "cpu", "float32").model.state_dict().items():
        assert weights[key].device.type == "cuda"
        assert torch.equal(weights[key].cpu(), expected)


def test_dropout_of_an_adapter_resumes_with_the_random_state_of_the_gpu(saved_models, tmp_path):
    rows = [
        Record(id=f"p{n // 2}", sample=n % 2, reward=float(n % 2), rollout={"samples": 2})
        | {"tokens": {"prompt": [3, 8], "completion": [3 + n, 4, 5, 6]}}
        for n in range(8)
    ]
    options = ["--prompts-per-step", 1, "--lora-rank", 4, "--lora-dropout", 0.3, "--lr", 0.01]
    for run, parts in {"whole": [rows], "parts": [rows[:4], rows[4:]]}.items():
        for number, part in enumerate(parts):
            path = tmp_path / f"{run}-{number}.jsonl"
            path.write_bytes(b"".join(map(dump, part)))
            kind = ["-m", saved_models("llada"), "--device", "cuda", "--dtype", "float32"]
            done = invoke("update", path, *kind, *options, "-o", tmp_path / run)
            assert done.exit_code == 0, done.output
    whole, parts = (
        load_file(tmp_path / run / "latest" / "adapter_model.safetensors")
        for run in ("whole", "parts")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight)


def test_memory_that_is_full_is_one_line_and_an_exit_code(prompts, tmp_path):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        done = rollout(prompts, tmp_path / "samples.jsonl", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.exit_code == 69
    assert done.stderr.splitlines() == [
        "dlmctl: the device has not enough memory: give a smaller --batch-size"
    ]
    assert rollout(prompts, tmp_path / "samples.jsonl", "cuda").exit_code == 0
