"""Records of features in the layout that Neuronpedia imports (as its commit ebb8426 reads it).

    MODEL/LAYER-SET/model.jsonl, sourceset.jsonl, source.jsonl       one line each
    MODEL/LAYER-SET/features/batch-0.jsonl.gz                        rows of the table Neuron
    MODEL/LAYER-SET/activations/batch-0.jsonl.gz                     of Activation
    MODEL/LAYER-SET/explanations/batch-0.jsonl.gz                    of Explanation

A batch has up to 1,024 features. Neuronpedia has no notion of masks: a masked token, of which the
model saw nothing, stands within [[ ]]. The histogram of all logits, and neurons and features that
correlate, are not in the records and stay empty.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import check_free, publish_directory
from dlmctl.records.jsonl import Record, dump

BATCH = 1024
"""Features in a file."""
CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that a new instance has, and that its own imports belong to."""
WINDOWS = ("top", "weighted")
"""Windows in which a feature is active."""


class Source(NamedTuple):
    """What an autoencoder is called."""

    model: str
    name: str
    """LAYER-SET."""

    @property
    def layer(self) -> int:
        return int(self.name.partition("-")[0])

    @property
    def set_name(self) -> str:
        # What follows two underscores tells sources of one set and layer apart.
        return self.name.partition("-")[2].partition("__")[0]


def source_of(directory: Path) -> Source:
    """The source whose export goes into a directory.

    Raises:
        UsageError: its name is not MODEL/LAYER-SET.
        CannotCreateError: there is something in it.
    """
    source = Source(directory.absolute().parent.name, directory.name)
    if not re.fullmatch(r"[a-z0-9_-]+", source.model) or not re.fullmatch(
        r"\d{1,9}-[a-z0-9][a-z0-9_-]*", source.name
    ):
        raise UsageError(
            f"--neuronpedia {directory} does not end with MODEL/LAYER-SET, such as "
            "llada-8b/26-mask-res-16k, in lower case: the names that Neuronpedia will show"
        )
    check_free(directory)
    return source


def with_neuronpedia(records: Iterable[Record], directory: Path) -> Iterator[Record]:
    """The records unchanged; the export is written after the last one.

    Raises:
        UsageError: as `source_of`, or the features are of another layer.
        DataError: a record lacks a field, or is of another autoencoder than those before.
    """
    source, files = source_of(directory), _Files()
    about: Mapping[str, Any] | None = None
    for record in records:
        if "windows" in record:
            try:
                about = about or _facts(record, source)
                if record["sae"] != about["sae"]:
                    raise DataError(f"a feature of {record['sae']} after those of {about['sae']}")
                files.add("features", _feature(record, source))
                for row in _activations(record, source):
                    files.add("activations", row)
                if record.get("explanation"):
                    files.add("explanations", _explanation(record, source))
            except (KeyError, TypeError, ValueError) as error:
                message = f"not a whole record of 'dlmctl sae-features' ({error})"
                raise DataError(message, record.where) from None
            files.end_feature()
        yield record
    if about is None:
        raise DataError("no feature to export to Neuronpedia")
    for name, row in _tables(source, about).items():
        files.contents[f"{name}.jsonl"] = dump(row)
    publish_directory(directory, files.write)


class _Files:
    """The files of an export, compressed in memory."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        """By name."""
        self._rows: dict[str, list[bytes]] = {}
        self._features = self._batches = 0

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        self._rows.setdefault(table, []).append(dump(row))

    def end_feature(self) -> None:
        self._features += 1
        if self._features % BATCH == 0:
            self._end_batch()

    def _end_batch(self) -> None:
        for table, rows in self._rows.items():
            name = f"{table}/batch-{self._batches}.jsonl.gz"
            self.contents[name] = gzip.compress(b"".join(rows), mtime=0)
        self._rows = {}
        self._batches += 1

    def write(self, directory: Path) -> None:
        self._end_batch()
        for name, content in self.contents.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)


def _facts(record: Record, source: Source) -> Mapping[str, Any]:
    """What the first record says of all; raises UsageError if it is of another layer."""
    if record["layer"] != source.layer:
        raise UsageError(
            f"--neuronpedia …/{source.name} names layer {source.layer}, and the features are of "
            f"layer {record['layer']}"
        )
    names = ("sae", "model", "revision", "latents", "k", "positions", "t", "corpus")
    return {name: record[name] for name in names}


def _tables(source: Source, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of the tables Model, SourceSet and Source, which an import adds if they are missing."""
    common = {"creatorId": CREATOR, "visibility": "PUBLIC"}
    owned = {"modelId": source.model, **common}
    noise = "" if about["t"] is None else ", t {:g} to {:g}".format(*about["t"])
    k = f", K {about['k']}" if about["k"] else ""
    title = f"{about['latents']} latents{k}, positions {about['positions']}"
    return {
        "model": {
            "id": source.model,
            **common,
            "displayName": about["model"],
            "displayNameShort": source.model,
            # Not in the records, nor in the exports of SAEDashboard.
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
        },
        "sourceset": {
            **owned,
            "name": source.set_name,
            "description": title,
            "type": "",
            "creatorName": "dlmctl",
            "urls": [],
        },
        "source": {
            **owned,
            "id": source.name,
            "setName": source.set_name,
            "num_prompts": about["corpus"]["documents"],
            "notes": f"{about['sae']} on {about['model']} ({about['revision']}): {title}{noise}",
        },
    }


def _place(record: Record, source: Source) -> dict[str, Any]:
    """The columns by which rows refer to a feature."""
    return {"modelId": source.model, "layer": source.name, "index": str(int(record["feature"]))}


def _feature(record: Record, source: Source) -> dict[str, Any]:
    edges, counts = record["histogram"]["edges"], record["histogram"]["counts"]
    logits = record["logits"]
    return {
        **_place(record, source),
        "sourceSetName": source.set_name,
        "creatorId": CREATOR,
        "maxActApprox": record["max"],
        "frac_nonzero": record["firing_rate"],
        "pos_str": [entry["token"] for entry in logits["top"]],
        "pos_values": [entry["logit"] for entry in logits["top"]],
        "neg_str": [entry["token"] for entry in logits["bottom"]],
        "neg_values": [entry["logit"] for entry in logits["bottom"]],
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": [(low + high) / 2 for low, high in pairwise(edges)],
    }


def _activations(record: Record, source: Source) -> Iterator[dict[str, Any]]:
    for kind in WINDOWS:
        for number, window in enumerate(record["windows"][kind]):
            values = window["activations"]
            largest = max(values)
            # Intervals of activations, of which -1 stands for the top.
            bins = -1 if kind == "top" else None
            yield {
                "id": _identity(record, source, kind, number),
                **_place(record, source),
                "creatorId": CREATOR,
                "tokens": [
                    f"[[{token}]]" if masked else token
                    for token, masked in zip(window["tokens"], window["masked"], strict=True)
                ],
                "values": values,
                "maxValue": largest,
                "maxValueTokenIndex": values.index(largest),
                "minValue": min(values),
                "qualifyingTokenIndex": window["middle"],
                **dict.fromkeys(("binMin", "binMax", "binContains"), bins),
            }


def _explanation(record: Record, source: Source) -> dict[str, Any]:
    judged, notes = record.get("judged"), None
    if judged:
        notes = (
            f"judged by {judged['judge']}: accuracy {judged['accuracy']:.3f}, balanced "
            f"{judged['balanced_accuracy']:.3f}"
        )
    return {
        "id": _identity(record, source, "explanation", 0),
        **_place(record, source),
        "description": record["explanation"],
        "authorId": CREATOR,
        "notes": notes,
    }


def _identity(record: Record, source: Source, kind: str, number: int) -> str:
    """An id of 25 characters, the same for the same row, so that it is imported once."""
    name = "/".join([*source, str(record["feature"]), kind, str(number)])
    return "c" + blake2b(name.encode(), digest_size=12).hexdigest()
