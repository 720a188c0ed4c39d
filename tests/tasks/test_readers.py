"""Prompts from files: every format gives the same records, and bad rows are named."""

import pytest

from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.settings.prompts import Prompts
from dlmctl.tasks.sources import prompts

ROWS = [
    {"question": "How many?", "answer": "so many\n#### 1,200"},
    {"question": "And\nnow?", "answer": "#### -3"},
]


def as_jsonl(directory):
    import orjson

    path = directory / "rows.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, ROWS)))
    return path


def as_csv(directory):
    import csv

    path = directory / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(directory):
    import pyarrow
    from pyarrow import parquet

    path = directory / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def as_dataset(directory):
    import datasets

    path = directory / "saved"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


def as_dataset_with_splits(directory):
    import datasets

    path = directory / "splits"
    datasets.disable_progress_bars()
    made = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    made.save_to_disk(path)
    return path


def as_folder(directory):
    folder = directory / "folder"
    folder.mkdir()
    as_parquet(folder)
    return folder


@pytest.mark.parametrize(
    "write", [as_jsonl, as_csv, as_parquet, as_dataset, as_dataset_with_splits, as_folder]
)
def test_every_format_gives_the_same_records(tmp_path, write):
    records = list(prompts("gsm8k", Prompts(origin=str(write(tmp_path)))))
    assert [r["answer"] for r in records] == ["1200", "-3"]
    assert [r["task"] for r in records] == ["gsm8k", "gsm8k"]
    assert "And\nnow?" in records[1]["prompt"]
    assert len({r["id"] for r in records}) == 2


def test_a_limit_and_a_mapping_apply_to_files(tmp_path):
    path = str(as_csv(tmp_path))
    [record] = prompts(path, Prompts(map=["prompt=question"], task="mine"), limit=1)
    assert record["prompt"] == "How many?"
    assert record["task"] == "mine"
    assert "question" not in record


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "question,answer\na,b\nc\n", "x.csv:3: the header has 2 columns"),
        ("x.csv", "question,answer\na,b,c\n", "x.csv:2: the header has 2 columns"),
        ("x.tsv", "other\tmore\na\tb\n", "x.tsv:2: no column is a prompt; there are other"),
        ("x.parquet", "no parquet", "x.parquet: not parquet"),
        ("x.jsonl", '{"a": 1}\n', "x.jsonl:1: no column is a prompt; there are a"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        list(prompts(str(tmp_path / name)))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"question\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"x.csv:\d: not CSV"):
        list(prompts(str(tmp_path / "x.csv")))


@pytest.mark.parametrize("name", ["no.csv", "no.parquet", "no.jsonl"])
def test_files_that_are_not_there_are_named(name):
    with pytest.raises(MissingInputError, match=name):
        list(prompts(name))


def test_bad_rows_can_be_kept_and_the_good_ones_go_on(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"question": "q"}\n')
    (tmp_path / "x.csv").write_text("question,n\nq\nq,1\n")
    for name in ("x.jsonl", "x.csv"):
        records = list(prompts(str(tmp_path / name), on_error="keep"))
        assert ["error" in r for r in records] == [True, False]
