"""Activations of features in the layout of EleutherAI's delphi (as its commit 3c2e139 reads it).

    DIRECTORY/MODULE/FIRST_LAST.safetensors     one for each range of features
        locations     [N, 3] row, position, feature - FIRST: uint16, or uint32 if a row or a
                      feature does not fit
        activations   float16 [N]
        tokens        int64 [rows, positions]
    DIRECTORY/MODULE/config.json

The tokens are those of the text, not the mask tokens that the model saw: delphi has no notion of
them. A row is a document, padded to the longest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

from dlmctl.records.files import make_directory, publish_directory
from dlmctl.sae.features.code_batch import CodeBatch

SPLITS = 5
"""Files that the features are divided among."""
LARGEST = torch.finfo(torch.float16).max


class DelphiCache:
    """A cache being written; use as a context.

    Codes wait in temporary files next to the directory, so that memory has to hold only one of
    them, at the end.
    """

    def __init__(self, directory: Path, d_sae: int, latents: Tensor, pad_id: int) -> None:
        """`latents`, int64 [S], are the features of the slots."""
        self._directory, self._latents, self._pad_id = directory, latents, pad_id
        ends = [d_sae * i // SPLITS for i in range(SPLITS + 1)]
        self._ranges = [(a, b - 1) for a, b in pairwise(ends) if a < b]
        self._open = ExitStack()
        self._texts: IO[bytes]
        """int32: number of a document, its length, its ids; and so on."""
        self._entries: Sequence[IO[bytes]] = ()
        """int32 [N, 4] for each range: document, position, feature, bits of the activation."""

    def __enter__(self) -> DelphiCache:
        make_directory(self._directory.parent)
        prefix = f".{self._directory.name}.partial-"
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=self._directory.parent)
        waiting = Path(self._open.enter_context(folder))
        names = ["tokens", *(str(first) for first, _ in self._ranges)]
        self._texts, *self._entries = [
            self._open.enter_context((waiting / name).open("w+b")) for name in names
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def recorded(self, stream: Iterable[CodeBatch]) -> Iterator[CodeBatch]:
        """The stream unchanged, written to the temporary files as it goes by."""
        for codes in stream:
            for document in codes.batch.documents:
                line = numpy.array([document.number, len(document.ids), *document.ids], numpy.int32)
                self._texts.write(line.tobytes())
            feature, bits = self._latents[codes.slot], codes.value.view(torch.int32)  # [P]
            row, column = codes.numbers[codes.row], codes.column  # [N]
            entries = torch.stack([row[codes.token], column[codes.token], feature, bits], 1).int()
            for (first, last), file in zip(self._ranges, self._entries, strict=True):
                within = (feature >= first) & (feature <= last)
                file.write(entries[within].numpy().tobytes())
            yield codes

    def write(self, module: str, config: Mapping[str, Any]) -> None:
        """Publish the directory; `config` is extended by what is known here."""
        tokens = self._tokens()
        rows, width = tokens.shape
        whole_config = {
            **config,
            "ctx_len": width,
            "cache_ctx_len": width,
            "n_tokens": rows * width,
            "n_splits": len(self._ranges),
        }

        def fill(folder: Path) -> None:
            (folder / module).mkdir()
            text = json.dumps(whole_config, indent=2)
            (folder / module / "config.json").write_text(text + "\n")
            for (first, last), file in zip(self._ranges, self._entries, strict=True):
                tensors = {**_split(_read(file).reshape(-1, 4), first), "tokens": tokens}
                save_file(tensors, folder / module / f"{first}_{last}.safetensors")

        publish_directory(self._directory, fill)

    def _tokens(self) -> Tensor:
        """int64 [rows, positions]."""
        flat, place = _read(self._texts), 0
        documents: dict[int, Tensor] = {}
        while place < len(flat):
            number, length = flat[place : place + 2].tolist()
            documents[number] = flat[place + 2 : place + 2 + length]
            place += 2 + length
        width = max(map(len, documents.values()), default=0)
        tokens = torch.full((len(documents), width), self._pad_id, dtype=torch.int64)
        for number, ids in documents.items():
            tokens[number, : len(ids)] = ids
        return tokens


def _split(entries: Tensor, first: int) -> dict[str, Tensor]:
    """Tensors of a file; entries in the order of row, position and feature."""
    for column in (2, 1, 0):
        entries = entries[entries[:, column].argsort(stable=True)]
    activations = entries[:, 3].contiguous().view(torch.float32).clamp(max=LARGEST).half()
    locations = entries[:, :3] - torch.tensor([0, 0, first], dtype=torch.int32)
    small = not len(locations) or int(locations[:, [0, 2]].max()) < 2**16
    dtype = torch.uint16 if small else torch.uint32
    return {"locations": locations.to(dtype), "activations": activations}


def _read(file: IO[bytes]) -> Tensor:
    """int32, all numbers of a file."""
    file.flush()
    file.seek(0)
    return torch.from_numpy(numpy.fromfile(file, numpy.int32))
