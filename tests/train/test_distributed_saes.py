"""Autoencoders trained under torchrun: each by one rank, and all as one process trains them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from conftest import invoke, read_jsonl, wait_for
from ranks import Ranks, same_files, same_metrics, write

from dlmctl.sae.activations import Key
from dlmctl.sae.training import division

NOTHING = Path(os.devnull)
SMALL = "--latents 16 --sae-batch-size 16 --buffer 1k --log-every 2 -b 3 -q"
Models = Callable[[str], str]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Nineteen batches of three texts, and one of a single text."""
    texts = [{"tokens": {"completion": [3 + n * k % 11 for k in range(4 + n % 9)]}}
             for n in range(58)]  # fmt: skip
    return write(tmp_path / "corpus.jsonl", texts)


def alone(line: str) -> None:
    done = invoke(*line.split())
    assert done.exit_code == 0, done.output


def same_runs(one: Path, other: Path) -> None:
    names = {path.name for path in one.iterdir()} - {".lock"}
    assert names == {path.name for path in other.iterdir()} - {".lock"}
    same_metrics(read_jsonl(one / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl"))
    for name in names - {"metrics.jsonl"}:
        same_files(one / name, other / name)


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        # Three of six autoencoders for each rank; the middle buffer is on both.
        ("llada", "--layers 0,1 -k 2,3 --positions mask,clean --tokens 900", 2),
        # One of two ranks trains nothing, and takes part in passes. The model has dropout.
        ("mlm", "-k 2 --layers 1 --t 0.5 --drop-norms 4 --tokens 150 --kind matryoshka "
         "--prefixes 1/4,1/2", 2),
        # The input ends before the training does, in the midst of a round.
        ("ar", "-k 2,3 --layers 1 --positions all --tokens 100000", 3),
    ],
)  # fmt: skip
def test_ranks_train_as_one_process(
    tmp_path: Path, saved_models: Models, corpus: Path, family: str, options: str, count: int
) -> None:
    line = f"sae-train -m {saved_models(family)} {options} {SMALL}"
    source = corpus if family != "ar" else Path("-")
    if source == corpus:
        alone(f"{line} -o {tmp_path}/one {source}")
    else:
        Ranks(f"{line} -o one -", tmp_path, corpus, 1).done()
    ranks = Ranks(f"{line} -o many {source}", tmp_path, corpus, count)
    same_metrics(read_jsonl(tmp_path / "one" / "metrics.jsonl"), ranks.done())
    same_runs(tmp_path / "one", tmp_path / "many")
    said = ranks.err[0].read_text()
    assert ("autoencoders on" in said) == (family != "llada")
    assert ("the input ended after" in said) == (family == "ar")
    assert not any(err.read_text() for err in ranks.err[1:])


def test_a_run_that_was_stopped_goes_on_at_another_number_of_ranks(
    tmp_path: Path, saved_models: Models, corpus: Path
) -> None:
    line = (
        f"sae-train -m {saved_models('llada')} -k 2,3 --positions mask,unmask --tokens 400 "
        f"{SMALL} --log-every 1 {corpus}"
    )
    alone(f"{line} -o {tmp_path}/one")
    for name, before, after in (("two-one", 2, 1), ("one-three", 1, 3)):
        reader, writer = os.pipe()
        stopped = Ranks(f"{line} -o {name} --save-minutes 0", tmp_path, NOTHING, before, writer)
        os.close(writer)
        with os.fdopen(reader) as records:
            for _ in range(30):
                records.readline()
        assert [command.wait() for command in stopped.commands] == [0] * before
        run = tmp_path / name
        state = os.readlink(run / "state" / "latest")
        assert int(state.rpartition("-")[2]) > 4
        assert not list(run.glob("layer*"))
        Ranks(f"{line} -o {name}", tmp_path, NOTHING, after).done()
        same_runs(tmp_path / "one", run)


def test_stored_activations_train_the_same(
    tmp_path: Path, saved_models: Models, corpus: Path
) -> None:
    model = saved_models("llada")
    alone(f"sae-activations {corpus} -m {model} --layers 0,1 -b 3 -o {tmp_path}/acts -q")
    line = f"sae-train {tmp_path}/acts -k 2 --tokens 400 {SMALL}"
    alone(f"{line} -o {tmp_path}/one")
    Ranks(f"{line} -o two", tmp_path, NOTHING).done()
    same_runs(tmp_path / "one", tmp_path / "two")
    again = Ranks(f"{line} -o two", tmp_path, NOTHING)
    again.done()
    assert "has all of these" in again.err[0].read_text()
    assert not again.err[1].read_text()


@pytest.mark.parametrize(
    ("record", "tokens", "said"),
    [({"prompt": 3}, 100_000, "corpus.jsonl:59"), ({"text": ""}, 100, "give a longer corpus")],
)
def test_what_cannot_be_trained_on_ends_all_ranks(
    tmp_path: Path, saved_models: Models, corpus: Path, record: dict, tokens: int, said: str
) -> None:
    with corpus.open("ab") as file:
        file.write(orjson.dumps(record) + b"\n")
    size = "--sae-batch-size 4096" if "longer" in said else ""
    line = f"sae-train -m {saved_models('llada')} -k 2,3 {SMALL} {size} --tokens {tokens} -o run -"
    ranks = Ranks(line, tmp_path, corpus)
    assert ranks.commands[0].wait() == 65
    ranks.commands[1].send_signal(signal.SIGTERM)  # as torchrun does
    ranks.commands[1].wait()
    assert said in ranks.err[0].read_text().replace("<stdin>", "corpus.jsonl")
    assert not ranks.err[1].read_text()
    assert not list((tmp_path / "run").glob("layer*"))


def test_a_signal_ends_all_ranks_and_the_first_says_where_it_stands(
    tmp_path: Path, saved_models: Models, corpus: Path
) -> None:
    line = f"sae-train -m {saved_models('llada')} -k 2,3 {SMALL} --save-minutes 0 -o run {corpus}"
    ranks = Ranks(line, tmp_path, NOTHING)
    wait_for((tmp_path / "run" / "state" / "latest").exists)
    for command in ranks.commands:
        command.send_signal(signal.SIGTERM)
    assert [command.wait() for command in ranks.commands] == [-signal.SIGTERM] * 2
    assert "interrupted: run was at block" in ranks.err[0].read_text()
    assert not ranks.err[1].read_text()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_every_autoencoder_is_trained_by_one_rank_and_all_ranks_by_as_many(
    monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(division, "world_size", lambda: ranks)
    keys = [Key(layer, "mask") for layer in range(3)]
    owners = division.divided(keys, [2, 4])
    found = [owner for key in keys for owner in owners[key].values()]
    assert list(owners[keys[0]]) == [2, 4]
    assert found == sorted(found)
    counts = [found.count(rank) for rank in range(ranks)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == 6
