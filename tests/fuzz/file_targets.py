"""Readers of files: weights, configurations, tokenizers, images, archives of torch.save."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from mutations import mutate_bytes, mutate_json, mutate_safetensors
from target import Target

from dlmctl.records.errors import UserFacingError

INDEX = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}, "metadata": {}}
PROGRESS = {
    "algo": "rspo",
    "reference": "a",
    "reference_revision": "b",
    "step": 3,
    "round": 1,
    "skipped": 0,
    "completions": 5,
    "tokens": 7,
    "settings": {},
}
SAE = {"architecture": "topk", "k": 2, "d_in": 4, "d_sae": 8, "metadata": {"hook_name": "x"}}
STATES = ("llada", "dream", "a2d", "mlm", "ar")


@cache
def _models() -> Path:
    """Small sound models, one for each family, written once for this process."""
    import atexit

    from dlmctl.models.saving import save_policy
    from dlmctl.models.small import make_policy
    from dlmctl.models.tokenizers import character_tokenizer
    from dlmctl.settings.small import SmallModel

    folder = Path(tempfile.mkdtemp(prefix="models-"))
    atexit.register(shutil.rmtree, folder, True)
    for family in STATES:
        made = make_policy(SmallModel(family, 16, 2, 2), character_tokenizer(), seed=1)
        (folder / family).mkdir()
        save_policy(made, folder / family)
    return folder


@cache
def _denoiser() -> Path:
    """A small denoiser, written once for this process."""
    from dlmctl.distill.image_checkpoints import ModelConfig, save_model
    from dlmctl.distill.image_networks import NetworkConfig, make_network

    config = ModelConfig("edm", NetworkConfig("mlp", (4,), width=8, blocks=1))
    folder = _models() / "denoiser"
    folder.mkdir()
    save_model(folder, config, make_network(config.network), {"step": 1})
    return folder


def _within(folder: Path, source: Path, name: str, data: bytes) -> Path:
    """A directory of the files of `source`, in which the file `name` is the input."""
    place = folder / "model"
    if not place.exists():
        shutil.copytree(source, place)
    (place / name).write_bytes(data)
    return place


def _seeds(source: Callable[[], Path], *names: str) -> list[bytes]:
    return [(source() / name).read_bytes() for name in names]


def _safetensors(**tensors: Any) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata={"format": "pt"})


def _weight_seeds() -> list[bytes]:
    import torch

    sae = {"W_enc": torch.ones(4, 8), "b_enc": torch.zeros(8)}
    sae |= {"W_dec": torch.ones(8, 4), "b_dec": torch.zeros(4)}
    return [
        _safetensors(images=torch.zeros(2, 3, 4, 4), other=torch.ones(3, dtype=torch.int64)),
        _safetensors(images=torch.zeros(2, 5, dtype=torch.uint8)),
        _safetensors(**sae),
        _safetensors(sparsity=torch.zeros(8)),
    ]


def _weights(data: bytes, folder: Path) -> None:
    from dlmctl.models.architecture import family_named
    from dlmctl.models.weights import read_weights, weights_hash

    path = folder / "model.safetensors"
    path.write_bytes(data)
    weights_hash([path])
    for tensor in read_weights([path], family_named("llada").rename).values():
        tensor.clone()


def _image_set(data: bytes, folder: Path) -> None:
    from dlmctl.distill.image_sets import read_about, read_images

    path = folder / "images.safetensors"
    path.write_bytes(data)
    read_about(str(path))
    read_images(str(path))


def _sae_weights(name: str, data: bytes, folder: Path) -> None:
    from dlmctl.sae.formats.folders import read_sae

    for file, seed in zip(("sae_weights", "sparsity"), _weight_seeds()[2:], strict=True):
        (folder / f"{file}.safetensors").write_bytes(seed)
    (folder / "cfg.json").write_text(json.dumps(SAE))
    (folder / name).write_bytes(data)
    read_sae(folder)


def _archive(data: bytes, folder: Path) -> None:
    from dlmctl.sae.formats.folders import read_sae

    (folder / "ae.pt").write_bytes(data)
    (folder / "config.json").write_text(
        json.dumps({"trainer": {"k": 2, "dict_class": "AutoEncoderTopK"}})
    )
    read_sae(folder)


@cache
def _archive_seeds() -> list[bytes]:
    import torch

    stream = io.BytesIO()
    state = {"encoder.weight": torch.ones(8, 4), "encoder.bias": torch.zeros(8)}
    state |= {"decoder.weight": torch.ones(4, 8), "b_dec": torch.zeros(4), "k": torch.tensor(2)}
    torch.save(state, stream)
    return [stream.getvalue()]


def _program(data: bytes, folder: Path) -> None:
    """An archive that is whole, with the input as its program."""
    import zipfile

    from dlmctl.models.torch_archive import read_torch_archive

    path = folder / "ae.pt"
    with (
        zipfile.ZipFile(io.BytesIO(_archive_seeds()[0])) as sound,
        zipfile.ZipFile(path, "w") as archive,
    ):
        for name in sound.namelist():
            is_program = name.endswith("data.pkl")
            archive.writestr(name, data if is_program else sound.read(name))
    read_torch_archive(path)


def _program_seeds() -> list[bytes]:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(_archive_seeds()[0])) as archive:
        return [archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))]


def _index(data: bytes, folder: Path) -> None:
    from dlmctl.models.weights import read_weights, weight_files

    (folder / "model.safetensors.index.json").write_bytes(data)
    for file in weight_files(folder):
        read_weights([file], str)


def _progress(data: bytes, folder: Path) -> None:
    from dlmctl.train.run_directory import forget_steps, read_progress

    (folder / "dlmctl.json").write_bytes(data)
    (folder / "metrics.jsonl").write_bytes(data)
    forget_steps(folder / "metrics.jsonl", 3)
    progress = read_progress(folder)
    progress.step + progress.round + progress.tokens
    progress.settings.items()


def _architecture(data: bytes, folder: Path) -> None:
    """What a config.json says, without a model."""
    from dlmctl.models.architecture import architecture
    from dlmctl.records.files import read_json

    path = folder / "config.json"
    path.write_bytes(data)
    architecture(read_json(path), str(path))


def _model(family: str, name: str, data: bytes, folder: Path) -> None:
    from dlmctl.models.loading import load_policy

    load_policy(str(_within(folder, _models() / family, name, data)), "cpu", "float32")


def _adapter(data: bytes, folder: Path) -> None:
    from dlmctl.models.loading import load_policy
    from dlmctl.models.token_text import tokenizer_of_model

    place = folder / "adapter"
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_bytes(
        data.replace(b"BASE", str(_models() / "ar").encode())
    )
    if not (place / "adapter_model.safetensors").exists():
        (place / "adapter_model.safetensors").write_bytes(_adapter_weights())
    refused: UserFacingError | None = None
    for read in (tokenizer_of_model, partial(load_policy, device="cpu", dtype="float32")):
        try:
            read(str(place))
        except UserFacingError as error:
            refused = error
    if refused:
        raise refused


@cache
def _adapter_files() -> tuple[bytes, bytes]:
    from peft import LoraConfig, get_peft_model

    from dlmctl.models.loading import load_policy

    base = load_policy(str(_models() / "ar"), "cpu", "float32")
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    place = _models() / "adapter"
    model.save_pretrained(str(place))
    config = json.loads((place / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "BASE"
    return json.dumps(config).encode(), (place / "adapter_model.safetensors").read_bytes()


def _adapter_weights() -> bytes:
    return _adapter_files()[1]


def _consistency(name: str, data: bytes, folder: Path) -> None:
    from dlmctl.distill.image_checkpoints import load_model

    load_model(str(_within(folder, _denoiser(), name, data)))


def _tokenizer(name: str, data: bytes, folder: Path) -> None:
    from dlmctl.models.prompting import text_ids
    from dlmctl.models.token_text import TokenTexts, tokenizer_of_model

    place = _within(folder, _models() / "llada", name, data)
    tokenizer = tokenizer_of_model(str(place))
    for text in ("12+3=5", "a\0é"):
        with contextlib.suppress(UserFacingError):
            tokenizer.decode(text_ids(tokenizer, text, "x"))
    TokenTexts(tokenizer).row([0, 1, 5, 6, 10**6])


def _picture(data: bytes, folder: Path) -> None:
    from dlmctl.tasks.images import load_image

    load_image(data)


def _uri(data: bytes, folder: Path) -> None:
    from dlmctl.records.jsonl import parse_record
    from dlmctl.report.pictures import pictures
    from dlmctl.tasks.image_columns import with_images
    from dlmctl.tasks.images import image_sources, record_images

    record = parse_record(data, str(folder / "in.jsonl:1"))
    pictures(record)
    refused: UserFacingError | None = None
    for read in (
        lambda: with_images({"prompt": "p"}, image_sources(record), record.where),
        lambda: record_images(record),
    ):
        try:
            read()
        except UserFacingError as error:
            refused = error
    if refused:
        raise refused


def _picture_seeds() -> list[bytes]:
    from PIL import Image

    made = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        for mode in ("RGB", "L", "P"):
            stream = io.BytesIO()
            Image.new(mode, (9, 7), 77).convert("RGB" if kind == "JPEG" else mode).save(
                stream, kind
            )
            made.append(stream.getvalue())
    return made


def _uri_seeds() -> list[bytes]:
    png = base64.b64encode(_picture_seeds()[0]).decode()
    uri = f"data:image/png;base64,{png}"
    sources = ([uri], uri, ["../a.png", "/etc/passwd"], [{"bytes": None, "path": "a.png"}])
    return [json.dumps({"id": "a", "images": held}).encode() for held in sources]


def prepare() -> None:
    """Load what takes long to load, and write the models, for all processes that are forked."""
    _denoiser()
    _adapter_files()


def file_targets() -> list[Target]:
    """Those of files, which cost more than records do."""
    cheap = [
        Target("weights", _weight_seeds, _weights, mutate_safetensors, 1),
        Target("image-set", _weight_seeds, _image_set, mutate_safetensors, 1),
        Target("sae-weights", lambda: _weight_seeds()[2:3],
               partial(_sae_weights, "sae_weights.safetensors"), mutate_safetensors, 0.5),
        Target("sae-rates", lambda: _weight_seeds()[3:],
               partial(_sae_weights, "sparsity.safetensors"), mutate_safetensors, 0.3),
        Target("sae-config", [json.dumps(SAE).encode()], partial(_sae_weights, "cfg.json"),
               mutate_json, 0.5),
        Target("archive", _archive_seeds, _archive, mutate_bytes, 0.5),
        Target("program", _program_seeds, _program, mutate_bytes, 0.5),
        Target("index", [json.dumps(INDEX).encode()], _index, mutate_json, 0.5),
        Target("progress", [json.dumps(PROGRESS).encode(), b'{"step": 1}\n{"step": 9}\n'],
               _progress, mutate_json, 0.5),
        Target("image", _picture_seeds, _picture, mutate_bytes, 1),
        Target("image-record", _uri_seeds, _uri, mutate_json, 1),
    ]  # fmt: skip
    configs = [
        Target(
            "architecture",
            lambda: _seeds(_models, *(f"{family}/config.json" for family in STATES)),
            _architecture, mutate_json, 0.1, imports=True),
        Target("tokenizer", lambda: _seeds(lambda: _models() / "llada", "tokenizer.json"),
               partial(_tokenizer, "tokenizer.json"), mutate_json, 0.1, imports=True),
        Target("tokenizer-config",
               lambda: _seeds(lambda: _models() / "llada", "tokenizer_config.json"),
               partial(_tokenizer, "tokenizer_config.json"), mutate_json, 0.1, imports=True),
        Target("adapter", lambda: [_adapter_files()[0]], _adapter, mutate_json, 0.02,
               imports=True),
        Target("denoiser", lambda: _seeds(_denoiser, "config.json"),
               partial(_consistency, "config.json"), mutate_json, 0.1, imports=True),
        Target("denoiser-weights", lambda: _seeds(_denoiser, "model.safetensors"),
               partial(_consistency, "model.safetensors"), mutate_safetensors, 0.1, imports=True),
    ]  # fmt: skip
    models = [
        Target(f"model-{family}", lambda family=family: _seeds(  # type: ignore[misc]
            lambda: _models() / family, "config.json"), partial(_model, family, "config.json"),
            mutate_json, 0.02, imports=True)
        for family in ("llada", "dream", "mlm", "ar")
    ]  # fmt: skip
    weights = Target(
        "model-weights", lambda: _seeds(lambda: _models() / "ar", "model.safetensors"),
        partial(_model, "ar", "model.safetensors"), mutate_safetensors, 0.02, imports=True,
    )  # fmt: skip
    return [*cheap, *configs, *models, weights]
