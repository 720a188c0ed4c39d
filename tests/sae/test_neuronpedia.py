"""The export for Neuronpedia: its files, its columns, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dlmctl.records.errors import CannotCreateError, DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.features.neuronpedia import BATCH, source_of, with_neuronpedia

COLUMNS = {
    "features": {
        "modelId", "layer", "index", "sourceSetName", "creatorId", "maxActApprox", "frac_nonzero",
        "pos_str", "pos_values", "neg_str", "neg_values", "freq_hist_data_bar_heights",
        "freq_hist_data_bar_values",
    },
    "activations": {
        "id", "modelId", "layer", "index", "creatorId", "tokens", "values", "maxValue",
        "maxValueTokenIndex", "minValue", "qualifyingTokenIndex", "binMin", "binMax", "binContains",
    },
    "explanations": {
        "id", "modelId", "layer", "index", "description", "authorId", "notes",
    },
}  # fmt: skip
"""Those of Neuronpedia's tables that are filled; an import reads them off the first line."""


def _window(values: list[float], masked: list[bool]) -> dict[str, Any]:
    tokens = [f" w{n}" for n in range(len(values))]
    return {"id": "text/1", "position": 7, "middle": 1, "t": 0.4, "tokens": tokens,
            "masked": masked, "activations": values}  # fmt: skip


def _record(feature: int, **more: Any) -> Record:
    record = Record(
        id=f"saes/a/{feature}", feature=feature, sae="saes/a", model="hub/Model", revision="abc",
        layer=26, latents=4000, k=50, positions="mask", t=[0.05, 0.5],
        corpus={"documents": 12, "tokens": 345, "alive": 6}, active=3, firing_rate=0.25, mean=1.5,
        max=4.0, histogram={"edges": [1.0, 2.0, 4.0], "counts": [5, 2]},
        logits={"top": [{"token": " up", "logit": 0.5}],
                "bottom": [{"token": " no", "logit": -1.5}]},
        windows={
            "top": [_window([0.0, 4.0, 1.0], [False, True, False])],
            "weighted": [_window([0.0, 1.5], [False, True])],
            "inactive": [_window([0.0, 0.0], [False, False])],
        },
        **more,
    )  # fmt: skip
    record.where = f"features.jsonl:{feature}"
    return record


def _export(records: list[Record], place: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of an export by the names of its files."""
    directory = place / "llada-8b" / "26-mask-res"
    assert list(with_neuronpedia(records, directory)) == records
    rows = {}
    for path in sorted(directory.rglob("*.jsonl*")):
        text = path.read_bytes()
        text = gzip.decompress(text) if path.suffix == ".gz" else text
        rows[str(path.relative_to(directory))] = [json.loads(line) for line in text.splitlines()]
    return rows


def test_rows_have_the_columns_of_the_tables(tmp_path: Path) -> None:
    judged = {"judge": "J", "accuracy": 0.75, "balanced_accuracy": 0.5}
    records = [_record(3), _record(9, explanation="digits", judged=judged)]
    rows = _export(records, tmp_path)
    assert set(rows) == {"model.jsonl", "sourceset.jsonl", "source.jsonl"} | {
        f"{table}/batch-0.jsonl.gz" for table in COLUMNS
    }
    for table, columns in COLUMNS.items():
        for row in rows[f"{table}/batch-0.jsonl.gz"]:
            assert set(row) == columns
            assert (row["modelId"], row["layer"]) == ("llada-8b", "26-mask-res")
            assert row["index"] in {"3", "9"}
    feature = rows["features/batch-0.jsonl.gz"][0]
    assert (feature["maxActApprox"], feature["frac_nonzero"]) == (4.0, 0.25)
    assert (feature["pos_str"], feature["neg_values"]) == ([" up"], [-1.5])
    assert feature["freq_hist_data_bar_values"] == [1.5, 3.0]
    assert feature["freq_hist_data_bar_heights"] == [5, 2]
    assert feature["sourceSetName"] == rows["sourceset.jsonl"][0]["name"] == "mask-res"
    assert rows["source.jsonl"][0]["setName"] == "mask-res"
    assert rows["source.jsonl"][0]["id"] == "26-mask-res"
    top, weighted = rows["activations/batch-0.jsonl.gz"][:2]
    assert top["tokens"] == [" w0", "[[ w1]]", " w2"]
    assert (top["maxValue"], top["maxValueTokenIndex"], top["minValue"]) == (4.0, 1, 0.0)
    assert (top["binMin"], weighted["binMin"]) == (-1, None)
    [explanation] = rows["explanations/batch-0.jsonl.gz"]
    assert (explanation["index"], explanation["description"]) == ("9", "digits")
    assert explanation["notes"] == "judged by J: accuracy 0.750, balanced 0.500"
    ids = [row["id"] for row in rows["activations/batch-0.jsonl.gz"]] + [explanation["id"]]
    assert len(set(ids)) == len(ids) == 5


def test_the_same_records_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _export([_record(n) for n in range(3)], tmp_path / name)
    first, second = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*l*")}
        for name in ("a", "b")
    )
    assert first == second


def test_a_batch_is_full_before_the_next_begins(tmp_path: Path) -> None:
    rows = _export([_record(n) for n in range(BATCH + 2)], tmp_path)
    assert len(rows["features/batch-0.jsonl.gz"]) == BATCH
    assert [row["index"] for row in rows["features/batch-1.jsonl.gz"]] == ["1024", "1025"]
    assert len(rows["activations/batch-1.jsonl.gz"]) == 4


@pytest.mark.parametrize("name", ["Model/3-set", "model/set", "model/3", "m/x-set", "a b/3-set"])
def test_a_path_that_names_no_source_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="does not end with MODEL/LAYER-SET"):
        source_of(tmp_path / name)


def test_what_follows_two_underscores_is_no_part_of_the_set(tmp_path: Path) -> None:
    assert source_of(tmp_path / "m" / "12-res-jb__l0-50").set_name == "res-jb"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "m" / "25-set"

    def export(*records: Record, into: Path = directory) -> None:
        list(with_neuronpedia(records, into))

    with pytest.raises(UsageError, match="layer 25, and the features are of layer 26"):
        export(_record(1))
    directory = tmp_path / "m" / "26-set"
    with pytest.raises(DataError, match=r"features.jsonl:2: not a whole record .*'max'"):
        export(_record(1), _without(_record(2), "max"), into=directory)
    other = _record(2)
    other["sae"] = "saes/b"
    with pytest.raises(DataError, match="saes/b after those of saes/a"):
        export(_record(1), other, into=directory)
    with pytest.raises(DataError, match="no feature"):
        export(into=directory)
    assert not directory.exists()
    export(_record(1), into=directory)
    with pytest.raises(CannotCreateError, match="not empty"):
        export(_record(1), into=directory)


def _without(record: Record, name: str) -> Record:
    del record[name]
    return record
