"""Sets of images: digits, cuts, safetensors, folders, records, and what is refused."""

from hashlib import blake2b

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from dlmctl.distill.image_sets import (
    as_floats,
    byte_levels,
    images_hash,
    read_images,
    read_pixels,
    training_pixels,
    write_images,
)
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.settings.images import ImageReading


def test_the_digits_are_those_of_scikit_learn_in_another_order():
    found = read_images("builtin:digits")
    assert (found.shape, found.dtype) == ((1797, 1, 8, 8), torch.float32)
    assert (found.min(), found.max()) == (-1, 1)
    wanted = load_digits()
    rows = {row.tobytes(): label for row, label in zip(wanted.images, wanted.target, strict=True)}
    labels = [rows[((one[0].double() + 1) * 8).numpy().tobytes()] for one in found]
    assert sorted(labels) == sorted(wanted.target)
    # Every class is there early on, and the order is the same each time.
    assert set(labels[:100]) == set(range(10))
    assert torch.equal(read_images("builtin:digits"), found)


def test_cuts_are_disjoint_and_whole():
    whole = read_images("builtin:digits")
    parts = [read_images(f"builtin:digits#{cut}") for cut in (":100", "100:250", "250:")]
    assert [len(part) for part in parts] == [100, 150, 1547]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 7)])
def test_what_is_written_is_read_back(tmp_path, shape):
    images = torch.rand(shape) * 2 - 1
    write_images(tmp_path / "a.safetensors", images.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(read_images(str(tmp_path / "a.safetensors")), images)
    assert torch.equal(read_images(str(tmp_path / "a.safetensors#1:3")), images[1:3])


def test_bytes_and_half_precision_become_float32(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    save_file({"anything": levels}, tmp_path / "bytes.safetensors")
    found = read_images(str(tmp_path / "bytes.safetensors"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), torch.linspace(-1, 1, 256))
    save_file({"half": torch.ones(2, 3).half()}, tmp_path / "half.safetensors")
    assert read_images(str(tmp_path / "half.safetensors")).dtype == torch.float32


def test_of_several_tensors_the_one_named_images_is_taken(tmp_path):
    save_file({"images": torch.zeros(2, 3), "labels": torch.ones(2)}, tmp_path / "a.safetensors")
    assert read_images(str(tmp_path / "a.safetensors")).tolist() == [[0.0] * 3] * 2


def picture(path, value, size=(4, 3)) -> None:
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)


def test_a_folder_is_read_by_name_in_colour_or_gray(tmp_path):
    picture(tmp_path / "b.png", (255, 0, 0))
    picture(tmp_path / "a.png", (0, 0, 0))
    (tmp_path / "notes.txt").write_text("no image")
    found = read_images(str(tmp_path))
    assert found.shape == (2, 3, 3, 4)
    assert found[0].unique().tolist() == [-1]
    assert found[1, :, 0, 0].tolist() == [1, -1, -1]
    gray = read_images(str(tmp_path), ImageReading(gray=True))
    assert gray.shape == (2, 1, 3, 4)
    # ITU-R 601: red is 0.299 of the luminance.
    assert gray[1].mean().item() == pytest.approx(2 * 0.299 - 1, abs=0.01)


def test_records_with_images_are_read(tmp_path):
    picture(tmp_path / "a.png", (255, 255, 255))
    line = orjson.dumps({"image": "a.png"})
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n" + line)
    found = read_images(str(tmp_path / "rows.jsonl"))
    assert found.shape == (2, 3, 3, 4)
    assert found.unique().tolist() == [1]


LEVELS = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)


def stored(path, tensor, **metadata) -> str:
    save_file({"images": tensor}, path, metadata=metadata or None)
    return str(path)


def test_floats_are_read_in_the_range_that_they_are_in(tmp_path, capsys):
    """To the last bit as the bytes that they were."""
    wanted = read_images(stored(tmp_path / "bytes.safetensors", LEVELS))
    both = stored(tmp_path / "both.safetensors", wanted)
    assert torch.equal(read_images(both), wanted)
    assert capsys.readouterr().err == ""
    unit = stored(tmp_path / "unit.safetensors", LEVELS.float() / 255)
    assert torch.equal(read_images(unit), wanted)
    said = capsys.readouterr().err
    assert "unit.safetensors: no number is negative, so 0 is black and 1 white" in said
    # The whole file decides, not the part that is asked for.
    assert torch.equal(read_images(f"{both}#1:"), wanted[1:])
    assert wanted[1:].min() > 0


def test_metadata_states_the_range(tmp_path, capsys):
    wanted = read_images(stored(tmp_path / "bytes.safetensors", LEVELS))
    for text, tensor in (("0:255", LEVELS.float()), ("0:1", LEVELS.float() / 255)):
        name = stored(tmp_path / "a.safetensors", tensor, range=text)
        assert torch.equal(read_images(name), wanted)
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 5
    name = stored(tmp_path / "b.safetensors", latents, range="any")
    assert torch.equal(read_images(name), latents)
    write_images(tmp_path / "c.safetensors", latents)  # samples overshoot
    assert torch.equal(read_images(str(tmp_path / "c.safetensors")), latents)
    bright = torch.rand(2, 1, 3, 3)
    write_images(tmp_path / "d.safetensors", bright)
    assert torch.equal(read_images(str(tmp_path / "d.safetensors")), bright)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tensor", "metadata", "message"),
    [
        (torch.full((1, 1, 2, 2), 1.5), {}, "floats from 1.5 to 1.5"),
        (LEVELS.float(), {}, "floats from 0 to 255.*range: 0:255"),
        (torch.full((1, 1, 2, 2), -1.01), {}, "floats from -1.01"),
        (torch.zeros(1, 1, 2, 2), {"range": "1:0"}, "range '1:0'"),
        (torch.zeros(1, 1, 2, 2), {"range": "bytes"}, "range 'bytes'"),
        (torch.zeros(1, 1, 2, 2), {"range": "0:inf"}, "range '0:inf'"),
    ],
)
def test_floats_of_no_known_range_are_refused(tmp_path, tensor, metadata, message):
    with pytest.raises(DataError, match=message):
        read_images(stored(tmp_path / "a.safetensors", tensor, **metadata))


def test_sets_that_are_compared_are_taken_to_be_in_one_range(tmp_path):
    unit = stored(tmp_path / "unit.safetensors", LEVELS.float() / 255)
    both = stored(tmp_path / "both.safetensors", LEVELS.float() / 127.5 - 1)
    known = stored(tmp_path / "known.safetensors", LEVELS)
    for first, second in ((unit, both), (both, unit)):
        taken: dict = {}
        for fine in (known, first, known, first):
            read_images(fine, taken=taken)
        with pytest.raises(DataError, match="sets that are compared are in one range"):
            read_images(second, taken=taken)
        read_images(second)


@pytest.mark.parametrize("name", ["images", "image", "img", "pixel_values", "scan"])
def test_the_column_of_images_is_found(tmp_path, name):
    """By its name, or as the one that `datasets` knows to be of images; in files and on disk."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    picture(tmp_path / "a.png", (255, 255, 255))
    cell = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    rows = [{"label": n, name: cell} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    features = {"label": datasets.Value("int64"), name: datasets.Image()}
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    saved.save_to_disk(tmp_path / "saved")
    for place in ("x.parquet", "saved"):
        found = read_images(str(tmp_path / place))
        assert found.shape == (3, 3, 3, 4)
        assert found.unique().tolist() == [1]
    path = dict(rows[0], **{name: "a.png"})
    (tmp_path / "rows.jsonl").write_bytes(orjson.dumps(path))
    if name == "scan":  # a text may be anything
        with pytest.raises(DataError, match="no images in its columns label, scan"):
            read_images(str(tmp_path / "rows.jsonl"))
    else:
        assert read_images(str(tmp_path / "rows.jsonl")).shape == (1, 3, 3, 4)


def test_of_several_columns_of_images_one_must_be_named(tmp_path):
    import pyarrow
    from pyarrow import parquet

    picture(tmp_path / "a.png", (255, 255, 255))
    picture(tmp_path / "b.png", (0, 0, 0))
    white, black = (
        {"bytes": (tmp_path / name).read_bytes(), "path": name} for name in ("a.png", "b.png")
    )
    for row, value in (
        ({"left": white, "right": black}, None),
        ({"left": white, "img": black}, -1),
        ({"mask": {"bytes": 3}, "left": white}, 1),
    ):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
        if value is None:
            with pytest.raises(DataError, match=r"parquet:1: .*columns left, right: name the one"):
                read_images(str(tmp_path / "x.parquet"))
        else:
            assert read_images(str(tmp_path / "x.parquet")).unique().tolist() == [value]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, "no tensor 'images', and 2 others"),
        ({"images": torch.zeros(2, 3, 4)}, r"not \[2, 3, 4\]"),
        ({"images": torch.zeros(2, 3, dtype=torch.int64)}, "bytes, not torch.int64"),
        ({"images": torch.tensor([[0.0, torch.nan]])}, "not all of its numbers are finite"),
    ],
)
def test_tensors_that_are_no_images_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message):
        read_images(str(tmp_path / "a.safetensors"))


def test_other_input_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is empty: builtin:digits has 1797 images"):
        read_images("builtin:digits#1797:")
    with pytest.raises(MissingInputError, match="there are: builtin:digits"):
        read_images("builtin:faces")
    with pytest.raises(MissingInputError, match="no file"):
        read_images(str(tmp_path / "no.safetensors"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk junk junk")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        read_images(str(tmp_path / "junk.safetensors"))
    (tmp_path / "many").mkdir()
    picture(tmp_path / "many" / "a.png", 0, (4, 3))
    picture(tmp_path / "many" / "b.png", 0, (5, 3))
    with pytest.raises(DataError, match="there are 4x3 and 5x3"):
        read_images(str(tmp_path / "many"))


def test_bytes_stay_bytes_and_are_the_same_numbers_in_any_batch(tmp_path):
    """As a whole set is converted, and as a table of all 256 bytes has them, bit for bit."""
    picture(tmp_path / "a.png", (1, 2, 3))
    save_file({"images": LEVELS}, tmp_path / "b.safetensors")
    for source in (tmp_path, tmp_path / "b.safetensors"):
        assert read_pixels(str(source)).dtype == torch.uint8
    pixels = torch.randint(256, (50, 3, 7, 5), dtype=torch.uint8)
    save_file({"images": pixels}, tmp_path / "c.safetensors")
    whole = read_images(str(tmp_path / "c.safetensors"))
    exact = pixels.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(whole.numpy(), exact)
    index = torch.randint(50, (33,))
    assert torch.equal(as_floats(pixels[index]), whole[index])
    assert torch.equal(byte_levels()[pixels[index].int()], whole[index])
    assert as_floats(whole) is whole
    assert images_hash(pixels) == images_hash(whole)
    # As it was when images were always floats.
    assert images_hash(pixels) == blake2b(whole.numpy().tobytes(), digest_size=8).hexdigest()
    assert images_hash(pixels[1:]) != images_hash(pixels)


def test_a_training_set_of_tensors_has_no_files_to_resize(tmp_path):
    assert training_pixels("builtin:digits", ImageReading()).dtype == torch.float32
    for reading, said in (
        (ImageReading(8, 4), "--resize 8 --crop 4"),
        (ImageReading(gray=True), "--gray"),
    ):
        with pytest.raises(UsageError, match=f"{said} is for image files"):
            training_pixels("builtin:digits#:10", reading)
