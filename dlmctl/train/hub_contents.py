"""What of a run, a model or autoencoders is sent to the Hugging Face hub, and what is not.

Weights and text are sent, with a model card. Locks, temporary files, pickles and the state of the
optimizer are not. Paths of the machine are replaced in the copies that are sent; the files
themselves stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.files import read_json
from dlmctl.settings.models import split_name
from dlmctl.train.card import CARD, DIRECTORY, HUB_NAME, Card, card_text
from dlmctl.train.run_directory import LATEST, TENSORS

WEIGHTS = "*.safetensors"
PLAIN = (WEIGHTS, "*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
"""Files that are pushed and pulled: weights and text, which run no code when they are read."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SAE_WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "ae.pt")
METRICS, SAE_CONFIG, MODEL_CONFIG, ADAPTER = (
    "metrics.jsonl",
    "cfg.json",
    "config.json",
    "adapter_config.json",
)
VOCABULARIES = ("tokenizer.json", "vocab*", "*_tokens*", "chat_template*")
"""Files whose text is of tokens and templates, in which what looks like a path is none."""
TOKENIZER, FILE_NAMES = "tokenizer_config.json", ("name_or_path", "tokenizer_file", "vocab_file")
"""A file that has tokens and templates too, and the names under which it keeps files."""
BASES = ("reference", "base_model_name_or_path", "model_name")
"""Names under which checkpoints and autoencoders keep the model that they began with or are for."""

LOCAL = "local:"
"""Stands before the name of a file or model that is on the machine of whoever pushed."""
ABSOLUTE = re.compile(r"([A-Za-z]+:)?(~[\w.-]*)?/[^/\s][^\n]*")
"""A value that is a path of this machine, as it is or behind a prefix such as `optimal:`."""
IN_TEXT = re.compile(r"(?:(?<=[\s`'\"(=|:])|^)~?(?:/[^\s/`'\"()|,;<>]+){2,}/?", re.MULTILINE)
"""A path of this machine within a text."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


@dataclass
class Contents:
    """What a push sends."""

    files: dict[str, Path | bytes]
    """By path in the repository: a file as it is, or what is sent in its place."""
    left_out: list[str]
    """Files beside them that are not sent."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Paths of this machine, and what is written in their place."""

    @property
    def card(self) -> str:
        return _text(self.files[CARD])

    @property
    def title(self) -> str:
        """The heading of the card; without one, what it is at least."""
        heading = re.search(r"^# (.+)$", self.card, re.MULTILINE)
        return heading[1] if heading else "a model"

    @property
    def licensed(self) -> bool:
        header = self.card.partition("\n---")[0]
        return re.search(r"^license:", header, re.MULTILINE) is not None

    def rows(self) -> list[dict[str, Any]]:
        """Files with their sizes in bytes; that of the card has its text."""
        return [
            {"file": name, "bytes": _size(data), **({"text": self.card} if name == CARD else {})}
            for name, data in sorted(self.files.items())
        ]


def contents_of(
    source: Path,
    repository: str,
    revision: str | None = None,
    base: str | None = None,
    include: Sequence[str] = (),
    resume_state: bool = False,
) -> Contents:
    """What a push of a run, checkpoint, model, adapter or folder of autoencoders sends.

    Args:
        base: hub name that stands for the directory of the model that it began with.
        include: patterns of further files.
        resume_state: with the state of the optimizer.

    Raises:
        MissingInputError: it is not there, or none of these; or it has no such state.
        DataError: its weights are pickled, a file is no JSON, or it contains an access token.
        UsageError: it is an adapter of a model that others cannot have, or `base` is no such name.
    """
    if base is not None and not HUB_NAME.fullmatch(base):
        raise UsageError(f"--base-model {base} is no name of the hub: give USER/NAME")
    link = source.expanduser() / LATEST
    directory = (link if link.exists() else source.expanduser()).resolve()
    if not directory.is_dir():
        raise MissingInputError(f"{source} is no directory: push takes a run, a model or SAEs")
    saes = _sae_folders(directory)
    contents = Contents(*_selected(directory, saes, include, resume_state))
    _check_weights(source, contents, resume_state)
    if not saes:
        metrics = _metrics(directory)
        contents.files |= {METRICS: metrics} if metrics else {}
    if CARD not in contents.files:
        name = repository.split("/")[1]
        card = _sae_card(directory, saes, name) if saes else _model_card(directory, name)
        contents.files[CARD] = card_text(card).encode()
    _replace_paths(contents, base)
    adapted = contents.files.get(ADAPTER)
    if adapted is not None:
        on = str(orjson.loads(_text(adapted)).get("base_model_name_or_path"))
        if on.startswith(LOCAL):
            raise UsageError(
                f"{source} is an adapter of {on.removeprefix(LOCAL)}, a directory here: push that "
                "first and give its name by --base-model, or push what 'dlmctl merge' writes"
            )
    contents.files[CARD] = _for_hub(contents.card, repository, revision, base).encode()
    _check_secrets(contents)
    return contents


def _sae_folders(directory: Path) -> list[Path]:
    """The folders of autoencoders in a directory, which may be one itself; hidden ones are not."""
    found = {path.parent for name in SAE_WEIGHTS for path in directory.rglob(name)}
    return sorted(path for path in found if not _hidden(path.relative_to(directory)))


def _selected(
    directory: Path, saes: Sequence[Path], include: Sequence[str], resume_state: bool
) -> tuple[dict[str, Path | bytes], list[str]]:
    """The files that are sent, and the names of those that are not."""
    nested = any((directory / name).exists() for name in ("model_index.json", "unet"))
    places = {directory, *saes}
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        name = inside.as_posix()
        if not path.is_file() or _hidden(inside):
            continue
        belongs = (nested or path.parent in places) and matches(path.name, PLAIN)
        if path.name == TENSORS:
            belongs = belongs and resume_state
        if belongs or matches(name, include):
            files[name] = path
        elif path.parent in places:
            left_out.append(name)
    return files, left_out


def _check_weights(source: Path, contents: Contents, resume_state: bool) -> None:
    known = (MODEL_CONFIG, ADAPTER, "model_index.json", f"unet/{MODEL_CONFIG}")
    weights = [n for n in contents.files if matches(n, (WEIGHTS,)) and n != TENSORS]
    is_sae = any(PurePosixPath(name).name in SAE_WEIGHTS for name in contents.files)
    pickled = [name for name in contents.left_out if matches(name, PICKLES)]
    if not weights and pickled:
        raise DataError(
            f"{pickled[0]} is a pickle, which is not pushed: convert it ('dlmctl sae-convert', or "
            "save_pretrained(..., safe_serialization=True)), or give --include to push it as it is",
            str(source),
        )
    if not weights or not (is_sae or any(name in contents.files for name in known)):
        raise MissingInputError(f"{source} has no model, no adapter and no autoencoder to push")
    if resume_state and TENSORS not in contents.files:
        raise MissingInputError(
            f"--resume-state: {source} has no {TENSORS}, which runs of 'update' and 'distill "
            "masked' have"
        )


def _metrics(directory: Path) -> bytes | None:
    """The metrics of a run up to a checkpoint; None if it is not a run's."""
    number, log = re.fullmatch(r"step-(\d+)", directory.name), directory.parent / METRICS
    if number is None or not log.exists():
        return None
    kept = []
    for line in log.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(orjson.JSONDecodeError, LookupError, TypeError, ValueError):
            if int(orjson.loads(line)["step"]) <= int(number[1]):
                kept.append(line)
    return b"".join(kept)


def _model_card(directory: Path, name: str) -> Card:
    """The card of a model or an adapter that has none."""
    adapter = directory / ADAPTER
    config = directory / MODEL_CONFIG
    about = read_json(adapter if adapter.exists() else config) if config.exists() else {}
    kind = "diffusers" if not config.exists() else str(about.get("model_type") or "model")
    family = (about.get("dlmctl") or {}).get("family")
    image = about.get("kind") in ("edm", "consistency") or not config.exists()
    use = f"dlmctl {'distill sample' if image else 'rollout --model'} {DIRECTORY}"
    return Card(
        title=name,
        summary=f"{'A LoRA adapter' if adapter.exists() else 'A model'} for dlmctl"
        + (f", of the family `{family}`." if family else "."),
        library="peft" if adapter.exists() else ("dlmctl" if image else "transformers"),
        base=about.get("base_model_name_or_path"),
        tags=[family] if family else [kind],
        usage=[("sh", use + (" -o samples.safetensors" if image else " prompts.jsonl"))],
    )


def _sae_card(directory: Path, saes: Sequence[Path], name: str) -> Card:
    """The card of a folder of autoencoders, with a row for each."""
    rows, models = {}, set()
    for folder in saes:
        about = read_json(folder / SAE_CONFIG)
        metadata = about.get("metadata") or {}
        models.add(metadata.get("model_name"))
        parts = {
            "architecture": about.get("architecture"),
            "latents": about.get("d_sae"),
            "k": about.get("k"),
            "hook": metadata.get("hook_name"),
        }
        inside = folder.relative_to(directory).as_posix()
        rows[inside] = ", ".join(f"{k} {v}" for k, v in parts.items() if v is not None)
    [model] = models if len(models) == 1 else [None]
    first = saes[0].relative_to(directory).as_posix()
    place = DIRECTORY if first == "." else f"{DIRECTORY}/{first}"
    return Card(
        title=name,
        summary=f"Sparse autoencoders ({len(saes)})" + (f" of `{model}`" if model else "") + ".",
        library="saelens",
        base=str(model) if model else None,
        tags=["sparse-autoencoder"],
        settings=rows,
        usage=[
            ("sh", f"dlmctl sae-eval {DIRECTORY} corpus.jsonl"),
            ("python", f'from sae_lens import SAE\n\nsae = SAE.load_from_disk("{place}")'),
        ],
    )


def _replace_paths(contents: Contents, base: str | None) -> None:
    """Put stand-ins in the place of paths of this machine, in all texts but those of tokens."""

    def stand_in(value: str, key: str, file: str) -> str:
        if file == TOKENIZER and key not in FILE_NAMES:
            return value
        is_base = key in BASES and value != ""
        local = ABSOLUTE.fullmatch(value) or (is_base and os.path.exists(split_name(value)[0]))
        if not local:
            return value
        path, reading = split_name(value) if is_base else (value, None)
        name = LOCAL + path.rstrip("/").rpartition("/")[2]
        if is_base and base is not None:
            name = base
        contents.replaced[value] = reading.name(name) if reading else name
        return contents.replaced[value]

    for name, data in contents.files.items():
        if matches(PurePosixPath(name).name, VOCABULARIES):
            continue
        if name.endswith(".json"):
            contents.files[name] = _rewritten(data, name, stand_in) or data
        elif name.endswith(".jsonl"):
            lines = enumerate(_bytes(data).splitlines(keepends=True), 1)
            changed = b"".join(_rewritten(x, f"{name}:{n}", stand_in) or x for n, x in lines)
            contents.files[name] = data if changed == _bytes(data) else changed
    for name, data in contents.files.items():
        if name.endswith(".md"):
            text = _text(data)
            for path in IN_TEXT.findall(text):
                if not any(path in value for value in contents.replaced):
                    contents.replaced[path] = LOCAL + path.rstrip("/").rpartition("/")[2]
            for value, name_there in sorted(contents.replaced.items(), reverse=True):
                whole = rf"(?<![\w/.-]){re.escape(value)}(?![\w/-])"
                text = re.sub(whole, lambda _, new=name_there: new, text)  # type: ignore[misc]
            contents.files[name] = text.encode()


def _rewritten(
    data: Path | bytes, where: str, stand_in: Callable[[str, str, str], str]
) -> bytes | None:
    """A JSON value with its texts replaced; None if nothing is."""
    changes, file = 0, PurePosixPath(where).name

    def walk(value: Any, key: str) -> Any:
        nonlocal changes
        if isinstance(value, dict):
            return {inner: walk(v, inner) for inner, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        if isinstance(value, str) and (new := stand_in(value, key, file)) != value:
            changes += 1
            return new
        return value

    try:
        value = walk(json.loads(_bytes(data)), "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where) from None
    indent = 2 if file.endswith(".json") else None
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode() if changes else None


def _for_hub(card: str, repository: str, revision: str | None, base: str | None) -> str:
    """A card that says where it is fetched from, and names the base on the hub if one is given."""
    named = f"dlmctl pull {repository}{f'@{revision}' if revision else ''} {DIRECTORY}"
    card, before = re.subn(rf"dlmctl pull \S+ {DIRECTORY}", named, card)
    if not before:
        card = card.replace("\n## Use\n\n", f"\n## Use\n\n```sh\n{named}\n```\n\n", 1)
    if base is None:
        return card
    from huggingface_hub import ModelCard

    read = ModelCard(card)
    read.data["base_model"] = base.split("@")[0]
    return str(read)


def _check_secrets(contents: Contents) -> None:
    """Raise DataError for a text that contains an access token of the hub."""
    from huggingface_hub import get_token

    own = get_token()
    for name, data in contents.files.items():
        if matches(name, (WEIGHTS, *PICKLES)):
            continue
        for number, line in enumerate(_bytes(data).decode("utf-8", "replace").splitlines(), 1):
            if TOKEN.search(line) or (own and own in line):
                raise DataError(
                    "an access token of the hub is in it: remove it", f"{name}:{number}"
                )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is of one of these patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _bytes(data: Path | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()


def _text(data: Path | bytes) -> str:
    return _bytes(data).decode("utf-8", "replace")


def _size(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size
