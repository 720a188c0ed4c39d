"""How every published diffusion language model that is known here would be read, or refused.

`published_checkpoints.json` has a row for names on the hub that are alike: the fields of
config.json that decide (those of the kind, and their own), with small sizes; the id of the
tokenizer's mask token, if it has one; and what is expected. `fields` says how sure the fields are:

    seen           read in the authors' own files, or in a public copy of them
    reconstructed  from the authors' code, a model card or descriptions by others
    invented       no published model; the row shows what happens to such a one

A row with `refused` has the beginning of the error. If it also has `reading`, the settings after
the name that the error recommends, the model is then read as `read` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dlmctl.models.architecture import architecture
from dlmctl.models.attention import Blocks, windowed_layers
from dlmctl.models.special_tokens import load_tokenizer, special_tokens
from dlmctl.plan.description import describe
from dlmctl.records.errors import DataError
from dlmctl.records.files import read_json
from dlmctl.settings.models import Reading, split_name

TABLE = json.loads(Path(__file__).with_name("published_checkpoints.json").read_text())
ROWS = {name: row for row in TABLE["rows"] for name in row["names"]}


def downloaded(place: Path, name: str, row: dict[str, Any]) -> Path:
    """The files of a checkpoint but for its weights, where huggingface_hub puts them."""
    directory = place / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
    directory.mkdir(parents=True)
    fields = TABLE["kinds"].get(row.get("kind"), {}) | row.get("config", {})
    (directory / "config.json").write_text(json.dumps(fields))
    vocabulary = {"<pad>": 0, "<eos>": 1}
    if "mask" in row:
        vocabulary["<|mask|>"] = row["mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary)),
        pad_token="<pad>",
        eos_token="<eos>",
        **({"mask_token": "<|mask|>"} if "mask" in row else {}),
    ).save_pretrained(directory)
    return directory


def check_reading(name: str, expected: dict[str, Any]) -> dict[str, str]:
    """That a model is read as the row says; returns what `doctor` says of it."""
    plain, reading = split_name(name)
    file = Path(plain) / "config.json"
    arch = architecture(read_json(file), str(file), reading)
    special = special_tokens(name, arch, load_tokenizer(Path(plain), arch), Path(plain))
    blocks = expected.get("blocks")
    found = {
        "family": arch.family.name,
        "cls": arch.model_class(name).__name__,
        "shift": arch.shift,
        "mask": special.mask_id,
        "pattern": arch.family.pattern,
        **({} if arch.blocks is None else {"blocks": blocks}),
    }
    assert found == expected
    assert arch.blocks == (None if blocks is None else Blocks(**blocks))
    if expected["cls"] != "ModernBertForMaskedLM":  # its layers with a window are its own
        assert windowed_layers(arch.config) == 0
    if expected["pattern"] is not None:
        assert getattr(arch.config, "is_causal", True) == (expected["pattern"] == "causal")
    traits = {trait.name: trait.detail for trait in describe(name) if not trait.doubtful}
    assert traits["family"].startswith(f"{expected['family']}: ")
    assert traits["class"].startswith(f"{expected['cls']} of transformers")
    assert traits["shift"].startswith(f"{expected['shift']}: ")
    if expected["mask"] is not None:
        assert traits["mask token"].startswith(f"{expected['mask']} ")
    return {trait.detail: trait.name for trait in describe(name) if trait.doubtful}


@pytest.mark.parametrize("name", ROWS)
def test_a_published_checkpoint_is_read_as_its_authors_do_or_refused(tmp_path, name):
    row = ROWS[name]
    directory = downloaded(tmp_path, name, row)
    if message := row.get("refused"):
        with pytest.raises(DataError) as refusal:
            describe(str(directory))
        assert refusal.value.message.startswith(message)
        assert refusal.value.where == str(directory / "config.json")
    if "read" in row:
        behind = f",{row['reading']}" if "reading" in row else ""
        doubts = check_reading(f"{directory}{behind}", row["read"])
        assert any(row.get("doubt", "") in doubt for doubt in doubts)
        if "doubt" not in row:
            assert not any("mask token" in doubt and "tokenizer has a" in doubt for doubt in doubts)


def test_the_table_says_of_every_row_how_sure_it_is_and_what_is_expected():
    assert len(ROWS) == sum(len(row["names"]) for row in TABLE["rows"]) >= 60
    for row in TABLE["rows"]:
        assert row["fields"] in ("seen", "reconstructed", "invented")
        assert "read" in row or "refused" in row


@pytest.mark.parametrize("kind", ["llada", "llada-moe", "rnd1"])
def test_blocks_of_a_family_that_has_none_are_refused_unless_it_is_named(kind):
    raw = TABLE["kinds"][kind] | {"block_size": 32}
    with pytest.raises(DataError, match=f"block_size indicates .* write MODEL,family={kind} if"):
        architecture(raw, "config.json")
    assert architecture(raw, "config.json", Reading(kind)).blocks is None


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("pattern", ["a2d", "bd3lm,block_length=4"])
def test_a_sliding_window_that_is_switched_off_is_none(tmp_path, kind, pattern):
    """Qwen's `use_sliding_window` = false turns `sliding_window` off; Mistral and Gemma have none
    such, and their windows count."""
    fields = {
        "model_type": kind, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20, "sliding_window": 4096,
        "max_window_layers": 3, "mask_token_id": 2,
    }  # fmt: skip
    if kind == "qwen2":
        del fields["head_dim"]
    qwen, reading = kind.startswith("qwen"), split_name(f"m,family={pattern}")[1]
    for used in (False, True) if qwen else (None,):
        raw = fields | ({} if used is None else {"use_sliding_window": used})
        config = architecture(raw, "config.json", reading).config
        expected = {None: 6 if kind == "mistral" else 5, False: 0, True: 3}[used]
        assert windowed_layers(config) == expected
