"""`dlmctl push` and `pull` against a hub on localhost, through huggingface_hub's own client."""

from __future__ import annotations

import importlib
import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from conftest import invoke, read_jsonl
from hub_server import TOKEN, Hub, hub_server
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import Result


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the only one, with a cache of its own."""
    with hub_server() as server:
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hub-home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        importlib.reload(huggingface_hub.constants)
        yield server
    monkeypatch.undo()
    importlib.reload(huggingface_hub.constants)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str | Path | int, code: int = 0) -> Result:
    done = invoke(str(arguments[0]), *arguments[1:])
    assert done.exit_code == code, done.output
    return done


def new_model(where: Path) -> Path:
    run("init", where, "--hidden-size", 16, "--layers", 2, "--gen-length", 16)
    return where


def trained(where: Path, model: str | Path, *options: str | int) -> Path:
    data = where.with_suffix(".jsonl")
    run("prompts", "sudoku", "-n", 2, "--completions", "-o", data)
    run("update", "--algo", "sft", "-m", model, "-o", where, "--lr", 0.01, *options, data)
    return where


def completions(model: str | Path, place: Path) -> list[dict[str, Any]]:
    """Records of a rollout, but for what they say of the model's name."""
    source, target = place / "prompts.jsonl", place / "records.jsonl"
    run("prompts", "sudoku", "-n", 2, "-o", source)
    options = ["-n", 2, "--gen-length", 16, "--steps", 4, "--seed", 3]
    run("rollout", source, "-m", model, *options, "-o", target)
    records = read_jsonl(target)
    assert len(records) == 4
    for record in records:
        del record["rollout"]["model"]
    return records


def test_a_model_comes_back_as_it_was(place: Path, hub: Hub) -> None:
    model = new_model(place / "small")
    done = run("push", model, "ann/small", "--private", "--message", "first")
    assert hub.repositories["ann/small"].private
    assert hub.repositories["ann/small"].messages == ["first"]
    assert f"{hub.url}/ann/small/commit/" in done.stderr
    assert "licence" in done.stderr
    run("pull", "ann/small", "back")
    for file in model.iterdir():
        assert (place / "back" / file.name).read_bytes() == file.read_bytes()
    card = ModelCard.load(place / "back/README.md")
    assert card.data.library_name == "transformers"
    assert {"dlmctl", "llada"} <= set(card.data.tags)
    assert "dlmctl pull ann/small DIRECTORY" in card.text
    kept = {path.name for path in (place / "back").iterdir()}
    assert kept == {path.name for path in model.iterdir()} | {"README.md"}  # no files of the hub's
    assert not list(place.glob(".back*"))
    assert completions("back", place) == completions(model, place)
    assert completions("ann/small", place) == completions(model, place)


def test_the_newest_checkpoint_of_a_run_is_sent_without_what_is_of_this_machine(
    place: Path, hub: Hub
) -> None:
    model = new_model(place / "small")
    checkpoints = trained(
        place / "run", model, "--prompts-per-step", 1, "--keep", 2, "--save-every", 1
    )
    kept = {file.name for file in (checkpoints / "latest").iterdir()} - {"training.safetensors"}
    for source, name in (("run", "ann/run"), ("run/latest", "ann/latest")):
        done = run("push", source, name)
        files = hub.files(name)
        assert set(files) - {".gitattributes"} == {
            *kept,
            "metrics.jsonl",
        }
        assert not [n for n, data in files.items() if str(place).encode() in data]
        assert json.loads(files["dlmctl.json"])["reference"] == "local:small"
        assert f"{model} is written as local:small" in done.stderr
        assert b"`local:small`" in files["README.md"]
        assert f"pull {name} DIRECTORY".encode() in files["README.md"]
        steps = [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()]
        assert steps == [1, 2]
    assert str(model) in (checkpoints / "latest/dlmctl.json").read_text()  # ours is as it was
    run("push", checkpoints / "step-000001", "ann/early")
    assert len(hub.files("ann/early")["metrics.jsonl"].splitlines()) == 1
    run("pull", "ann/run", "back")
    assert completions("back", place) == completions(checkpoints, place)


def test_an_adapter_needs_a_base_on_the_hub_and_comes_back_with_it(place: Path, hub: Hub) -> None:
    pytest.importorskip("peft")
    model = new_model(place / "small")
    adapter = trained(place / "lora", model, "--lora-rank", 2)
    refused = run("push", adapter, "ann/lora", code=2)
    assert "is an adapter of small" in refused.output
    assert "ann/lora" not in hub.repositories
    run("push", model, "ann/small")
    run("push", adapter, "ann/lora", "--base-model", "ann/small")
    files = hub.files("ann/lora")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "ann/small"
    assert json.loads(files["dlmctl.json"])["reference"] == "ann/small"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "ann/small")
    run("pull", "ann/lora", "back")
    model.rename(place / "elsewhere")  # so that the base can only be the one of the hub
    back = completions("back", place)
    (place / "elsewhere").rename(model)
    ours, plain = completions(adapter, place), completions(model, place)
    assert back == ours
    assert back != plain


def test_a_run_resumes_from_its_state_elsewhere(place: Path, hub: Hub) -> None:
    first = trained(place / "run", "builtin:puzzles", "--prompts-per-step", 1)
    run("push", first, "ann/run", "--resume-state")
    assert "training.safetensors" in hub.files("ann/run")
    run("pull", "ann/run", "again/step-000002")
    (place / "again/latest").symlink_to("step-000002")
    run("prompts", "sudoku", "-n", 3, "--completions", "-o", "more.jsonl")
    weights = []
    options = ["--algo", "sft", "--lr", 0.01, "--prompts-per-step", 1]
    for where in ("run", "again"):
        run("update", "-o", where, *options, "more.jsonl")
        assert (place / where / "step-000005").is_dir()
        weights.append((place / where / "latest/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_autoencoders_come_back_and_work_at_once(place: Path, hub: Hub) -> None:
    run("prompts", "sudoku", "-n", 30, "--completions", "-o", "corpus.jsonl")
    sizes = ["-k", "2,4", "--latents", 16, "--tokens", 200, "--sae-batch-size", 50]
    run("sae-train", "corpus.jsonl", "--layers", 1, *sizes, "-o", "saes")
    folders = sorted(path.name for path in (place / "saes").iterdir() if path.is_dir())
    assert len(folders) == 2
    run("push", "saes", "ann/saes", "--revision", "v1")
    assert set(hub.files("ann/saes")) == {".gitattributes"}  # of main
    files = hub.files("ann/saes", "v1")
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "saelens"
    assert all(re.search(rf"\| {name} \| .*latents 16", card.text) for name in folders)
    assert "pull ann/saes@v1 DIRECTORY" in card.text
    assert {name for name in files if name.endswith("sae_weights.safetensors")} == {
        f"{folder}/sae_weights.safetensors" for folder in folders
    }
    run("pull", "ann/saes@v1", "back")
    measured = []
    for where in ("saes", "back"):
        run("sae-eval", where, "corpus.jsonl", "--json")
        rows = invoke("sae-eval", where, "corpus.jsonl", "--json").stdout.splitlines()
        measured.append([{**json.loads(row), "sae": None} for row in rows])
    assert len(measured[0]) == 2
    assert measured[0] == measured[1]
    run("push", place / "back" / folders[0], "ann/one")
    assert {"cfg.json", "sae_weights.safetensors", "README.md"} <= set(hub.files("ann/one"))


def test_image_models_come_back_and_make_the_same_samples(place: Path, hub: Hub) -> None:
    few = ["--steps", 2, "--batch-size", 4]
    run("distill", "teacher", "builtin:digits#0:8", "--width", 8, *few, "-o", "plain")
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(place / "teacher")
    student = ["--teacher", place / "teacher", "-o", "student"]
    run("distill", "cd", "builtin:digits#0:8", *few, *student)
    for source, weights in (
        ("plain", "model.safetensors"),
        ("teacher", "unet/diffusion_pytorch_model.safetensors"),
        ("student", "unet/diffusion_pytorch_model.safetensors"),
    ):
        done = run("push", source, f"ann/{source}")
        files = hub.files(f"ann/{source}")
        assert weights in files
        assert ("metrics.jsonl" in files) == (source != "teacher")
        assert not [name for name, data in files.items() if str(place).encode() in data]
        assert (str(place) in done.stderr) == (source == "student")  # it names its teacher
        run("pull", f"ann/{source}", f"{source}-back")
        samples = []
        for model in (source, f"{source}-back"):
            target = place / f"{model}.safetensors"
            run("distill", "sample", model, "-n", 2, "--steps", 2, "-o", target)
            samples.append(load_file(target))
        assert samples[0]
        assert all(torch.equal(made, samples[1][name]) for name, made in samples[0].items())


def test_after_a_failure_halfway_nothing_is_visible_and_the_same_command_completes(
    place: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(place / "run", "builtin:puzzles")
    # The client waits between its six attempts, for half a minute in all.
    impatient = types.SimpleNamespace(**vars(huggingface_hub.utils._http.time))
    impatient.sleep = lambda _: None
    monkeypatch.setattr(huggingface_hub.utils._http, "time", impatient)
    hub.failing_uploads = (2, 1000)
    line = ("push", "run", "ann/run", "--resume-state")  # two files of weights
    failed = run(*line, code=75)
    assert re.search(
        r"answers 500 .*; nothing of it is visible there; the same command", failed.stderr
    )
    assert failed.stderr.count("\ndlmctl: ann/run") == 1
    assert "http" not in failed.stderr  # addresses of uploads are signed
    assert len(hub.objects) == 1
    assert set(hub.files("ann/run")) == {".gitattributes"}
    hub.failing_uploads, tried = (0, 0), len(hub.uploads)
    run(*line)
    assert len(hub.uploads) == tried + 1  # the first file is not sent again
    for name in ("model.safetensors", "training.safetensors"):
        assert hub.files("ann/run")[name] == (place / "run/latest" / name).read_bytes()
    assert "has these files already" in run(*line).stderr
    assert len(hub.repositories["ann/run"].messages) == 1


def test_a_dry_run_lists_files_and_card_and_asks_no_server(place: Path, hub: Hub) -> None:
    trained(place / "run", "builtin:puzzles")
    done = run("push", "run", "ann/run", "--dry-run", "--include", "*.svg")
    rows = {row["file"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {"README.md", "model.safetensors", "config.json", "metrics.jsonl"} <= set(rows)
    assert (
        rows["model.safetensors"]["bytes"]
        == (place / "run/latest/model.safetensors").stat().st_size
    )
    assert "# puzzles, sft" in rows["README.md"]["text"].replace("builtin:", "")
    assert "not pushed: training.safetensors" in done.stderr
    assert hub.paths == []


def test_secrets_pickles_and_what_is_no_model_are_not_sent(place: Path, hub: Hub) -> None:
    model = new_model(place / "small")
    (model / ".lock").touch()
    (model / "notes.txt").write_text(f"line\nlogin with {TOKEN}\n")
    refused = run("push", model, "ann/small", code=65)
    assert "notes.txt:2" in refused.stderr
    assert TOKEN not in refused.output
    (model / "notes.txt").unlink()
    (model / "README.md").write_text("see /home/ann/data/set, and/or https://example.org/a/b\n")
    rows = run("push", model, "ann/small", "--dry-run").stdout.splitlines()
    texts = {row["file"]: row.get("text") for row in map(json.loads, rows)}
    assert texts["README.md"] == "see local:set, and/or https://example.org/a/b\n"
    assert ".lock" not in texts
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in run("push", model, "ann/small", code=65).stderr
    (place / "empty").mkdir()
    run("push", "empty", "ann/small", code=66)
    run("push", "missing", "ann/small", code=66)
    run("push", model, "small", code=2)
    assert hub.repositories == {}


def test_weights_are_not_put_beside_others(place: Path, hub: Hub) -> None:
    pytest.importorskip("peft")
    run("push", new_model(place / "small"), "ann/small")
    adapter = trained(place / "lora", "builtin:puzzles", "--lora-rank", 2)
    refused = run("push", adapter, "ann/small", code=2)
    assert "has model.safetensors, which this push does not replace" in refused.stderr


def test_what_is_to_be_private_does_not_go_where_all_can_read_it(place: Path, hub: Hub) -> None:
    model = new_model(place / "small")
    run("push", model, "ann/small")
    before = dict(hub.repositories["ann/small"].branches)
    done = run("push", model, "ann/small", "--private", "--message", "again", code=2)
    assert "was there before and is public" in done.stderr
    assert hub.repositories["ann/small"].branches == before


def test_pull_fetches_no_pickles_and_no_code_unless_asked(place: Path, hub: Hub) -> None:
    weights = (new_model(place / "small") / "model.safetensors").read_bytes()
    files = {"config.json": b"{}", "modeling.py": b"import os", "a/ae.pt": b"P" * 9}
    hub.put("bob/pickled", {**files, "pytorch_model.bin": b"P" * 2000})
    refused = run("pull", "bob/pickled", "back", code=65)
    assert "only pickled weights (" in refused.stderr
    hub.put("bob/both", {**files, "model.safetensors": weights})
    run("pull", "bob/both", "back")
    assert {p.name for p in (place / "back").rglob("*")} == {"config.json", "model.safetensors"}
    run("pull", "bob/both", "more", "--include", "*/ae.pt")
    assert (place / "more/a/ae.pt").read_bytes() == files["a/ae.pt"]
    assert not (place / "more/modeling.py").exists()
    hub.put("bob/cut", {**files, "model.safetensors": weights[:-5]})
    assert "not a whole safetensors file" in run("pull", "bob/cut", "cut", code=65).stderr
    assert not (place / "cut").exists()
    hub.put("bob/text", files | {"a/ae.pt": b""} and {"config.json": b"{}"})
    run("pull", "bob/text", "text", code=66)
    assert "not empty" in run("pull", "bob/both", "back", code=73).stderr


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (("pull", "ann/none", "x"), 66, "no ann/none on the hub"),
        (("pull", "bob/small@v9", "x"), 66, "no such revision"),
        (("pull", "bob/small@a", "x", "--revision", "b"), 2, "two revisions"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    place: Path, hub: Hub, line: tuple[str, ...], code: int, says: str
) -> None:
    hub.put("bob/small", {"model.safetensors": b""})
    failed = run(*line, code=code)
    assert says in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_without_a_token_a_network_or_leave_the_line_says_so(
    place: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, saved_models: Callable[[str], str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = ("push", saved_models("llada"), "ann/small")
    assert "hf auth login" in run(*line, code=73).stderr.splitlines()[-1]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for command in (line, ("pull", "ann/small", "back")):
        assert "HF_HUB_OFFLINE is set" in run(*command, code=75).stderr.splitlines()[-1]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # A port on which nothing listens.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for command in (line, ("pull", "ann/small", "back")):
        assert "the hub does not answer" in run(*command, code=75).stderr.splitlines()[-1]
