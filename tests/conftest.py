"""Small real models, and the command line as a process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from preload import dlmctl_script
from preloaded import HANGS
from typer.testing import CliRunner, Result

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the packages below are imported
os.environ["DLMCTL_DEVICE"] = "cpu"  # of every command, in processes that tests start too

from dlmctl.cli import app
from dlmctl.models.policy import Family, Policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.settings.small import SmallModel
from dlmctl.tasks.images import as_data_uri

torch.set_num_threads(1)
# A shell starts what runs in its background with Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_kills.py", "test_pipes.py", "test_loop.py")
"""Files that begin first: at the end, one worker would be busy with them and the others with
nothing."""


CUDA = {name: getattr(torch.cuda, name) for name in ("is_available", "device_count")}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that are not marked `cuda` run on the CPU, on a machine with a GPU too."""
    hidden = "cuda" not in item.keywords
    torch.cuda.is_available = (lambda: False) if hidden else CUDA["is_available"]
    torch.cuda.device_count = (lambda: 0) if hidden else CUDA["device_count"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def tiny_policy(
    family: Family = "llada", alphabet: str = "01234=", seed: int = 0, layers: int = 2
) -> Policy:
    """A model of few layers in float64, whose weights are large enough to have opinions."""
    small = SmallModel(family, 16, layers, 2, gen_length=6)
    return _in_float64(make_policy(small, character_tokenizer(alphabet), seed), 0.4, seed)


def tiny_vision_policy(
    kind: str = "qwen2.5-vl", alphabet: str = "01234=?<>/descriptonhk ", seed: int = 0
) -> Policy:
    """A vision-language model in float64, whose weights are large enough to have opinions."""
    small = SmallModel(kind, 16, 2, 2, gen_length=6)
    return _in_float64(make_policy(small, character_tokenizer(alphabet), seed), 0.3, seed)


def _in_float64(policy: Policy, spread: float, seed: int) -> Policy:
    """The policy with weights N(0, spread^2), a revision of its own, and float64 in all layers.

    The RMSNorms of transformers compute in float32 whatever they are given, and a sum in another
    order would show at 1e-7 where a test of float64 expects 1e-12.
    """
    model = policy.model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, spread, generator=generator)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    model.double()
    if model._can_set_experts_implementation():  # that of mixtures takes no float64
        model.set_experts_implementation("eager")
    return replace(policy, revision=f"{policy.family}-{seed}")


def noise_image(seed: int, width: int = 84, height: int = 84) -> str:
    """An image of random pixels as a data URI."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return as_data_uri(Image.fromarray(pixels))


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directory of a small saved model of a family, made once."""
    from dlmctl.models.saving import save_policy

    made: dict[str, str] = {}

    def get(family: str) -> str:
        if family not in made:
            small = SmallModel(family, 16, 2, 2, gen_length=16)
            policy = make_policy(small, character_tokenizer(), seed=1)
            directory = tmp_path_factory.mktemp(f"model-{family}")
            save_policy(policy, directory)
            made[family] = str(directory)
        return made[family]

    return get


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C++ part of a mirrored CUDA device is built, once (see tests/mirrored)."""
    if shutil.which("g++") is None:
        pytest.skip("the mirrored device is C++, and there is no g++")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("the mirrored device has the hooks of torch 2.13")
    return tmp_path_factory.mktemp("mirror") / "guard.so"


def invoke(name: str, *arguments: str | Path | int) -> Result:
    """Run a subcommand in this process, which saves the start of another."""
    return CliRunner().invoke(app, [name, *map(str, arguments)])


def greedy_records(place: Path, model: str | Path, prompts: list[str], gen_length: int) -> Path:
    """File of the completions that `dlmctl rollout` makes of these prompts, one each."""
    lines = [orjson.dumps({"id": str(n), "prompt": text}) for n, text in enumerate(prompts)]
    source, target = place / "prompts.jsonl", place / "greedy.jsonl"
    source.write_bytes(b"\n".join(lines))
    options = ["--temperature", "0", "--gen-length", gen_length, "-n", "1", "-o", target]
    kind = ["--device", "cpu", "--dtype", "float32"]
    result = invoke("rollout", source, "-m", model, *kind, *options)
    assert result.exit_code == 0, result.output
    return target


def shell(
    line: str,
    cwd: Path,
    fresh: bool = False,
    more: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a line of shell as a user types it, standard input empty.

    `fresh` starts each `dlmctl` from nothing, which takes seconds where it needs torch; `more` is
    added to its environment.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if not fresh:
        environment["PATH"] = f"{dlmctl_script().parent}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=cwd,
        env={**environment, **(more or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def wait_for(condition: Callable[[], Any], said: Callable[[], str] = str) -> None:
    """Return once the condition holds; `said` tells why it does not."""
    deadline = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)


def nearly(value: Any, rel: float = 1e-6, abs: float = 0.0) -> Any:
    """What JSON equals that differs by the rounding of its floats alone."""
    if isinstance(value, dict):
        return {name: nearly(inner, rel, abs) for name, inner in value.items()}
    if isinstance(value, list):
        return [nearly(inner, rel, abs) for inner in value]
    return pytest.approx(value, rel=rel, abs=abs) if isinstance(value, float) else value


def read_jsonl(path: Path) -> list[dict]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]
