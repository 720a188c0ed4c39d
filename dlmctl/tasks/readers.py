"""Rows from files and data sets: JSONL, CSV, parquet, and everything that `datasets` loads."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlmctl.records.errors import DataError, MissingInputError, TryAgainError, reason_of
from dlmctl.records.jsonl import OnError, Record, faulty, located, read_records

FILE_KINDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")


def read_rows(name: str, split: str, config: str | None, on_error: OnError) -> Iterator[Record]:
    """Rows of a file, of a directory that `datasets` loads, or of a data set on the hub.

    Args:
        name: `-` for JSONL on standard input, a path, or a hub name.
        split, config: of a data set; ignored for a file.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: it cannot be read.
        TryAgainError: the hub does not answer.
    """
    path = Path(name)
    kind = path.suffix.lower()
    if name == "-" or (kind in (".jsonl", ".json", ".ndjson") and not path.is_dir()):
        yield from read_records([name], on_error)
    elif kind in (".csv", ".tsv") and not path.is_dir():
        yield from _csv_rows(path, "\t" if kind == ".tsv" else ",", on_error)
    elif kind == ".parquet" and not path.is_dir():
        yield from _parquet_rows(path)
    else:
        yield from _dataset_rows(name, split, config)


def _csv_rows(path: Path, delimiter: str, on_error: OnError) -> Iterator[Record]:
    try:
        stream = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise MissingInputError(f"cannot read {path} ({error.strerror})") from None
    with stream:
        reader = csv.DictReader(stream, delimiter=delimiter, restkey="")
        try:
            for values in reader:
                row = located(values, f"{path}:{reader.line_num}")
                if "" in values or None in values.values():
                    columns = len(reader.fieldnames or [])
                    message = f"the header has {columns} columns, this line not"
                    yield from faulty(row, DataError(message, row.where), on_error)
                else:
                    yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"not CSV ({error})", f"{path}:{reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise MissingInputError(f"cannot read {path} (No such file or directory)") from None
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"not parquet ({error})", str(path)) from None
    number = 0
    try:
        for batch in table.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield located(values, f"{path}:{number}")
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"not parquet from here on ({' '.join(str(error).split())})", f"{path}:{number + 1}"
        ) from None


def _dataset_rows(name: str, split: str, config: str | None) -> Iterator[Record]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    path = Path(name)
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(name)
            if isinstance(rows, dict) and split not in rows:
                raise DataError(f"there is no split {split}; there are: {', '.join(rows)}", name)
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=not path.exists())
    except (FileNotFoundError, DatasetNotFoundError):
        kinds = " ".join(FILE_KINDS)
        raise MissingInputError(
            f"no file, directory or data set {name} (files are known by their endings: {kinds})"
        ) from None
    except (KeyError, ValueError) as error:
        raise DataError(reason_of(error), name) from None
    except OSError as error:
        reason = reason_of(error)
        raise TryAgainError(f"{name} is not here, and the hub does not answer ({reason})") from None
    for number, values in enumerate(_undecoded(rows), start=1):
        yield located(values, f"{name}[{split}]:{number}")


def _undecoded(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows with images as the stored bytes and path; whoever needs an image decodes it."""
    import datasets

    if not _has_images(rows.features, datasets.Image):
        yield from rows
        return
    for table in rows.with_format("arrow"):
        yield from table.to_pylist()


def _has_images(feature: Any, kind: type) -> bool:
    """Whether a feature of `datasets` is, or contains, one of images; None is unknown."""
    if feature is None:
        return False
    if isinstance(feature, Mapping):
        return any(_has_images(inner, kind) for inner in feature.values())
    if isinstance(feature, list):
        return any(_has_images(inner, kind) for inner in feature)
    return isinstance(feature, kind) or _has_images(getattr(feature, "feature", None), kind)
