"""Runs of many autoencoders: independent of each other, resumable, the same from disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.models.blocks import block_outputs
from dlmctl.records.errors import CannotCreateError, DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.activations import Key, model_activations, store_activations
from dlmctl.sae.corpus import (
    CorpusPlan,
    Document,
    MaskedBatch,
    MaskLaw,
    documents,
    masked_corpus,
    together,
)
from dlmctl.sae.formats.folders import read_sae
from dlmctl.sae.topk import JumpReluSae
from dlmctl.sae.training.run import SaeRun, begun_with
from dlmctl.sae.training.sources import ModelSource, Source, StoredSource
from dlmctl.sae.training.stream import Stream
from dlmctl.settings.sae import PROFILES, PUBLISHED_ROWS, Feed, SaeKind, SaeRecipe

POLICY = tiny_policy()
LAW = MaskLaw(0.2, 0.8, seed=3)
RECIPE = SaeRecipe(latents=24, batch_size=32, tokens=32 * 12, rate=1e-3, dead_after=128, seed=5)
CPU = torch.device("cpu")


def _documents() -> Iterator[Document]:
    records = [
        Record(id=n, text="".join("01234="[(n * k) % 6] for k in range(12))) for n in range(150)
    ]
    return documents(records, POLICY, 99)


def _batches() -> Iterator[MaskedBatch]:
    return masked_corpus(_documents(), POLICY, LAW, 4)


def _windows() -> Iterator[list[Document]]:
    return together(_documents(), 4)


def _source(layers: list[int], positions: list[Any]) -> Source:
    return ModelSource(POLICY, _windows, layers, positions, CorpusPlan(LAW, 99))


def _run(directory: Path, source: Source, ks: list[int], **changes: Any) -> SaeRun:
    streams = [Stream(key, ks, RECIPE, source.width, 128, None, CPU) for key in source.keys]
    return SaeRun(directory, streams, {"ks": ks, **changes}, source.metadata, CPU)


def _trained(directory: Path, source: Source, ks: list[int]) -> list[dict[str, Any]]:
    run = _run(directory, source, ks)
    records = list(run.train(source.blocks(run.blocks), 1, 1e9))
    run.finish()
    return records


def _weights(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return read_sae(directory / name).sae.state_dict()


def test_an_autoencoder_does_not_depend_on_what_is_trained_beside_it(tmp_path: Path) -> None:
    _trained(tmp_path / "all", _source([0, 1], ["mask", "unmask"]), [2, 4])
    _trained(tmp_path / "one", _source([1], ["unmask"]), [4])
    wanted = _weights(tmp_path / "one", "layer1-k4-unmask")
    found = _weights(tmp_path / "all", "layer1-k4-unmask")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = _weights(tmp_path / "all", "layer1-k4-mask")
    assert not torch.equal(other["W_dec"], wanted["W_dec"])


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: SaeKind
) -> None:
    monkeypatch.setitem(globals(), "RECIPE", dataclasses.replace(RECIPE, kind=kind))
    source = _source([0], ["mask", "unmask"])
    wanted = _trained(tmp_path / "whole", source, [2])
    run = _run(tmp_path / "cut", source, [2])
    steps = run.train(source.blocks(0), 1, -1.0)  # saves after every block
    while run.blocks < 8:
        next(steps)
    blocks = run.blocks
    assert blocks < 16  # activations are still coming in
    for _ in range(3):
        next(steps)  # these are lost
    steps.close()
    again = _run(tmp_path / "cut", source, [2])
    assert again.blocks == blocks
    list(again.train(source.blocks(again.blocks), 1, 1e9))
    again.finish()
    for name in ("layer0-k2-mask", "layer0-k2-unmask"):
        first, second = _weights(tmp_path / "whole", name), _weights(tmp_path / "cut", name)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert ("threshold" in first) == (kind != "topk")
    assert read_jsonl(tmp_path / "cut" / "metrics.jsonl") == wanted
    assert not (tmp_path / "cut" / "state").exists()


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    source = _source([0], ["mask"])
    _run(tmp_path, source, [2], tokens=1).save()
    with pytest.raises(UsageError, match="another tokens"):
        _run(tmp_path, source, [2], tokens=2)


def test_an_autoencoder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = _source([0], ["mask"])
    _trained(tmp_path, source, [2])
    with pytest.raises(CannotCreateError, match="choose another"):
        _run(tmp_path, source, [2, 4])


def test_stored_activations_train_the_same(tmp_path: Path) -> None:
    keys: tuple[list[int], list[Any]] = ([0, 1], ["mask", "clean"])
    _trained(tmp_path / "model", _source(*keys), [2])
    (tmp_path / "acts").mkdir()
    about = {"model_name": "tiny"}
    written = list(store_activations(POLICY, _batches(), *keys, about, tmp_path / "acts"))
    stored = StoredSource(tmp_path / "acts", None, None, CPU)
    assert stored.keys == [Key(n, kind) for n in keys[0] for kind in keys[1]]
    assert (
        sum(len(b[Key(1, "mask")]) for _, b in zip(written, stored.blocks(0), strict=False))
        == (written[-1]["mask"])
    )
    _trained(tmp_path / "disk", stored, [2])
    for name in ("layer0-k2-mask", "layer1-k2-clean"):
        first, second = _weights(tmp_path / "model", name), _weights(tmp_path / "disk", name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(UsageError, match="has layers 0,1, and not 7"):
        StoredSource(tmp_path / "acts", [7], None, CPU)
    with pytest.raises(UsageError, match="has positions mask,clean, and not all"):
        StoredSource(tmp_path / "acts", None, ["all"], CPU)


@torch.no_grad()
def test_one_pass_gives_what_single_passes_give() -> None:
    for batch, block in zip(
        _batches(), model_activations(POLICY, _batches(), [1, 0], ["mask", "clean"]), strict=True
    ):
        for layer in (0, 1):
            masked = block_outputs(POLICY, batch.rows(POLICY), [layer])[layer]
            assert torch.equal(block[Key(layer, "mask")], masked[batch.masked])
            plain = block_outputs(POLICY, batch.clean().rows(POLICY), [layer])[layer]
            assert torch.equal(block[Key(layer, "clean")], plain[batch.selected("clean")])


def test_massive_activations_are_dropped() -> None:
    stream = Stream(Key(0, "mask"), [2], RECIPE, 4, 0, 10.0, CPU)
    rows = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    rows[7] = 1e4
    stream.add(rows)
    list(stream.train(last=True))
    assert stream.limit is not None
    assert stream.limit < 100
    stream.add(torch.full((3, 4), 1e3))
    assert len(stream.buffer) == 99 % 32


def test_draws_wait_for_a_full_buffer_and_leave_half_of_it() -> None:
    recipe = dataclasses.replace(RECIPE, tokens=RECIPE.batch_size * 1000)
    stream = Stream(Key(0, "mask"), [2], recipe, 4, 200, None, CPU)
    rows = torch.randn(150, 4, generator=torch.Generator().manual_seed(0))
    stream.add(rows)
    assert list(stream.train()) == []
    stream.add(rows)  # 300 rows, of which 100 remain, less than a batch of 32 more
    assert len(list(stream.train())) == 6
    assert len(stream.buffer) == 108
    assert len(list(stream.train(last=True))) == 3


@pytest.mark.parametrize(("rows", "capacity"), [(1, 64), (100, 100), (10**9, 32 * 12)])
def test_a_buffer_has_two_batches_at_least_and_the_run_at_most(rows: int, capacity: int) -> None:
    assert Stream(Key(0, "mask"), [2], RECIPE, 4, rows, None, CPU).buffer.capacity == capacity


def test_a_buffer_on_the_host_trains_the_same(tmp_path: Path) -> None:
    weights = []
    for on_host in (False, True):
        stream = Stream(Key(0, "mask"), [2], RECIPE, 4, 64, 10.0, CPU, on_host=on_host)
        stream.add(torch.randn(400, 4, generator=torch.Generator().manual_seed(0)))
        list(stream.train(last=True))
        weights.append(stream.trainers[2].sae.encoder.detach())
    assert torch.equal(*weights)


def test_a_run_that_is_resumed_keeps_its_buffer(
    tmp_path: Path, saved_models: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default its size is a share of the memory that is free at the beginning."""
    corpus, saes = tmp_path / "c.jsonl", tmp_path / "saes"
    invoke("prompts", "sudoku", "-n", "20", "--completions", "-o", corpus)
    sizes = ["--latents", "16", "-k", "2", "--tokens", "480", "--sae-batch-size", "16"]
    line = [corpus, "-m", saved_models("llada"), *sizes, "--save-minutes", "0", "-o", saes]
    kept, finish = iter([70 * 16 * 4, 10 * 16 * 4, 10**9]), SaeRun.finish
    monkeypatch.setattr("dlmctl.sae.training.buffer.share_of_memory", lambda: next(kept))

    def stop(run: SaeRun) -> list[Path]:
        raise DataError("no disk")

    monkeypatch.setattr(SaeRun, "finish", stop)
    first = invoke("sae-train", *line)
    assert "70 rows, which is what the free memory has room for" in first.stderr
    assert begun_with(saes)["buffer_rows"] == 70
    monkeypatch.setattr(SaeRun, "finish", finish)
    other = invoke("sae-train", *line, "--buffer", "80rows")
    assert (other.exit_code, "another buffer" in other.stderr) == (2, True)
    again = invoke("sae-train", *line)
    assert again.exit_code == 0, again.stderr
    assert "free memory" not in again.stderr
    whole = invoke("sae-train", *line[:-1], tmp_path / "whole", "--buffer", "70rows")
    assert whole.exit_code == 0, whole.stderr
    here, there = (_weights(path, "layer0-k2-mask") for path in (saes, tmp_path / "whole"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_the_published_profile_has_the_published_buffer() -> None:
    assert PROFILES["paper"]["buffer"] == f"{PUBLISHED_ROWS}rows"
    assert Feed(buffer=PROFILES["paper"]["buffer"]).buffer_rows(8192, 0) == PUBLISHED_ROWS


def test_too_short_a_corpus_is_an_error(tmp_path: Path) -> None:
    source = _source([0], ["mask"])
    run = _run(tmp_path, source, [2])
    with pytest.raises(DataError, match="fewer than a step of 32"):
        list(run.train(iter([]), 1, 1e9))


def test_the_command_trains_stops_and_says_so(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    model = saved_models("llada")
    corpus, saes = tmp_path / "c.jsonl", tmp_path / "saes"
    options = "--layers 0,1 -k 2,4 --positions mask,unmask --latents 32 --tokens 600 --t 0.2-0.9"
    more = "--sae-batch-size 64 --log-every 3"
    line = [corpus, "-m", model, *options.split(), *more.split(), "-o", saes]
    invoke("prompts", "sudoku", "-n", "20", "--completions", "-o", corpus)
    first = invoke("sae-train", *line)
    assert first.exit_code == 0, first.stderr
    assert f"8 autoencoders in {saes}" in first.stderr
    saved = read_sae(saes / "layer1-k4-unmask")
    assert saved.metadata["dlm_layer"] == 1
    assert saved.metadata["hook_name"] == "model.layers.1"
    assert saved.metadata["dlm_t_min"] == 0.2
    assert saved.metadata["dlm_tokens"] == 576
    assert saved.sae.k == 4
    again = invoke("sae-train", *line)
    assert again.exit_code == 0
    assert "has all of these" in again.stderr
    invoke("sae-activations", corpus, "-m", model, "--layers", "0,1", "-o", tmp_path / "acts")
    stored = invoke("sae-train", tmp_path / "acts", "--latents", "32", "-k", "2", "--tokens", "128",
                    "--sae-batch-size", "64", "-o", tmp_path / "from-disk")  # fmt: skip
    assert stored.exit_code == 0, stored.stderr
    assert {path.name for path in (tmp_path / "from-disk").iterdir()} - {".lock"} == {
        "layer0-k2-mask", "layer1-k2-mask", "metrics.jsonl",
    }  # fmt: skip


def test_an_autoencoder_says_of_what_kind_it_is(
    tmp_path: Path, saved_models: Callable[[str], str]
) -> None:
    corpus, saes = tmp_path / "c.jsonl", tmp_path / "saes"
    invoke("prompts", "sudoku", "-n", "20", "--completions", "-o", corpus)
    options = "-k 4 --latents 32 --kind matryoshka --prefixes 1/8,0.5 --tokens 600"
    line = [corpus, "-m", saved_models("llada"), "--sae-batch-size", "64", "-o", saes]
    done = invoke("sae-train", *options.split(), *line)
    assert done.exit_code == 0, done.stderr
    saved = read_sae(saes / "layer0-k4-mask")
    assert type(saved.sae) is JumpReluSae
    assert saved.sae.threshold.unique().numel() == 1
    assert float(saved.sae.threshold[0]) > 0
    assert (saved.sae.k, saved.metadata["dlm_kind"]) == (4, "matryoshka")
    assert saved.metadata["dlm_prefixes"] == [4, 16, 32]
    card = (saes / "layer0-k4-mask" / "README.md").read_text()
    assert "A Matryoshka BatchTopK sparse autoencoder of 32 latents, 4 of them active on" in card
    other = invoke("sae-train", *options.split()[:-2], "--tokens", "9", "--kind", "topk", *line)
    assert other.exit_code == 2
    assert "--prefixes means nothing to --kind topk" in other.stderr
    measured = invoke("sae-eval", saes, corpus, "--no-insert")
    assert measured.exit_code == 0, measured.stderr
    assert orjson.loads(measured.stdout)["k"] == 4


def test_an_autoencoder_has_a_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    records = _trained(tmp_path / "all", _source([0, 1], ["mask"]), [2, 4])
    _trained(tmp_path / "again", _source([1], ["mask"]), [4])
    folder = "layer1-k4-mask/README.md"
    card = ModelCard.load(tmp_path / "all" / folder)
    assert card.data.library_name == "saelens"
    assert "sparse-autoencoder" in card.data.tags
    last = [r for r in records if (r["layer"], r["k"]) == (1, 4)][-1]
    assert f"| fve | {last['fve']:.6g} |" in card.text
    assert "| latents | 24 |" in card.text
    assert "model.layers.1" in card.text
    again = (tmp_path / "again" / folder).read_bytes()
    assert again == (tmp_path / "all" / folder).read_bytes()
