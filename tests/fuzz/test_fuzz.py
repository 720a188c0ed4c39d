"""A share of the fuzzing, inputs that failed once, the guards, and what no file may call.

More of it: `DLMCTL_TEST_FUZZ=100000 pytest tests/fuzz`, or `python tests/fuzz/fuzz.py`.
"""

from __future__ import annotations

import ast
import os
import random
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import engine_targets
import file_targets
import fuzz
import guards
import record_targets
from target import Target

INPUTS = int(os.environ.get("DLMCTL_TEST_FUZZ", "2500"))
REGRESSIONS = sorted((Path(__file__).parent / "regressions").iterdir())
PACKAGE = Path(fuzz.__file__).parents[2] / "dlmctl"
CHEAP = [
    *record_targets.record_targets(),
    *engine_targets.engine_targets(),
    *file_targets.file_targets()[:11],
]
SHARES = sum(target.share for target in CHEAP)
EVERY = fuzz.all_targets()


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> guards.Watch:
    # One for all: an audit hook stays for the rest of the process.
    return guards.Watch(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def folder(watch: guards.Watch) -> Path:
    place = Path(watch.folder) / str(len(os.listdir(watch.folder)))
    place.mkdir()
    return place


def problems(runner: fuzz.Runner) -> str:
    return "\n".join(
        f"{key}: {entry['message']} {entry['frames']} {runner.inputs[key][:300]!r}"
        for key, entry in runner.outcome.findings.items()
    )


@pytest.mark.parametrize("target", CHEAP, ids=lambda target: target.name)
def test_no_input_hangs_crashes_runs_or_writes(
    target: Target, watch: guards.Watch, folder: Path
) -> None:
    runner = fuzz.Runner(target, folder, watch, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.fuzz(runner, max(15, round(INPUTS * target.share / SHARES)), f"test/{target.name}")
    assert not runner.outcome.findings, problems(runner)


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.name)
def test_what_failed_once(path: Path, watch: guards.Watch, folder: Path) -> None:
    runner = fuzz.Runner(EVERY[path.name.rpartition("-")[0]], folder, watch, None)
    runner.one(path.read_bytes())
    assert not runner.outcome.findings, problems(runner)


WRONG = {
    "ZeroDivisionError": lambda data, folder: 1 / 0,
    "RecursionError": lambda data, folder: WRONG["RecursionError"](data, folder),
    "ForbiddenError": lambda data, folder: subprocess.run(["true"], check=False),
    "ForbiddenError ": lambda data, folder: eval("1"),
    "ForbiddenError  ": lambda data, folder: (folder.parent.parent / "x").write_bytes(b""),
    "ForbiddenError   ": lambda data, folder: socket.create_connection(("127.0.0.1", 9)),
    "ForbiddenError    ": lambda data, folder: __import__("antigravity"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_guards_see_what_is_wrong(kind: str, watch: guards.Watch, folder: Path) -> None:
    silent = Target("x", [], WRONG[kind], lambda data, draw: data, 1)
    runner = fuzz.Runner(silent, folder, watch, None)
    runner.one(b"")
    assert [key.split()[0] for key in runner.outcome.findings] == [kind.strip()]


def test_a_reader_that_catches_everything_is_seen_all_the_same(
    watch: guards.Watch, folder: Path
) -> None:
    def swallow(data: bytes, folder: Path) -> None:
        try:
            os.system("true")
        except BaseException:
            return

    runner = fuzz.Runner(Target("x", [], swallow, lambda d, r: d, 1), folder, watch, None)
    runner.one(b"")
    assert runner.outcome.findings


def test_hangs_and_crashes_are_kept_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(data: bytes, folder: Path) -> None:
        if data == b"crash":
            os._exit(3)
        while data == b"hang":
            pass

    seeds = [b"a", b"hang", b"b"]
    monkeypatch.setattr(fuzz, "AGAIN", 2.0)
    # The sound inputs are tried before the watch begins.
    monkeypatch.setattr(fuzz.Runner, "warm", lambda self: None)
    hanging = Target("hanging", seeds, fragile, lambda data, draw: b"c", 1, wall=0.1)
    outcome = fuzz.supervise(hanging, 5, 0, tmp_path / "hanging", 0.0)
    assert (outcome.inputs, outcome.accepted) == (5, 4)
    assert [path.read_bytes() for path in (tmp_path / "hanging").iterdir()] == [b"hang"]

    crashing = Target("crashing", [b"a"], fragile, lambda data, draw: b"crash", 1)
    outcome = fuzz.supervise(crashing, 3, 0, tmp_path / "crashing", 0.0)
    assert outcome.findings["Crash: exit 3 "]["count"] >= 1
    assert [path.read_bytes() for path in (tmp_path / "crashing").iterdir()] == [b"crash"]


def test_the_same_seed_makes_the_same_inputs() -> None:
    def made(seed: str) -> list[bytes]:
        draw = random.Random(seed)
        return [t.mutate(t.beginnings()[0], draw) for t in CHEAP if not callable(t.seeds)]

    assert made("a") == made("a") != made("b")


def test_lines_that_are_new_are_counted() -> None:
    from dlmctl.tasks.boxes import last_boxed

    lines = guards.Lines(share=1)
    assert lines.new(lambda: last_boxed("x")) > 0
    assert lines.new(lambda: last_boxed("x")) == 0
    assert lines.new(lambda: last_boxed("\\boxed{1}")) > 0


MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}
HARNESS = "verifiers/harness.py"
"""Runs the code of completions, confined; that is its purpose."""


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangerous(tree: ast.AST) -> Iterator[str]:
    """What runs code out of data, or could."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            told = ("allow_pickle", "trust_remote_code", "shell", "use_safetensors")
            given = {w.arg: ast.unparse(w.value) for w in node.keywords if w.arg in told}
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
                yield name
            if name in ("torch.load", "torch.hub.load", "torch.jit.load"):
                yield name
            if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False":
                yield name
            if given.get("trust_remote_code", "False") != "False":
                yield f"{name}(trust_remote_code={given['trust_remote_code']})"
            if given.get("shell", "False") != "False":
                yield f"{name}(shell={given['shell']})"
            # Left open, it asks whether to run a checkpoint's code.
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                if "trust_remote_code" not in given:
                    yield f"{name} without trust_remote_code"
                if "Model" in name and given.get("use_safetensors") != "True":
                    yield f"{name} without use_safetensors"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load(f, weights_only=True)",
        "eval(x)",
        "exec(x)",
        "np.load(f)",
        "yaml.load(f); import yaml",
        "AutoModel.from_pretrained(d, trust_remote_code=True, use_safetensors=True)",
        "AutoTokenizer.from_pretrained(d)",
        "AutoModel.from_pretrained(d, trust_remote_code=False)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_what_is_dangerous_is_known(source: str) -> None:
    assert list(dangerous(ast.parse(source)))


def test_nothing_of_the_package_runs_what_it_reads() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for what in dangerous(ast.parse(path.read_text(encoding="utf-8")))
    }
    allowed = {f"{HARNESS}: {what}" for what in ("exec", "compile")}
    assert found <= allowed
    assert f"{HARNESS}: exec" in found  # the search finds what is there
