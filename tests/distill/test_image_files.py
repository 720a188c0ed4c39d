"""Images of folders and of data sets: where they are found, how they are cut, what is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import invoke, shell
from PIL import Image

from dlmctl.distill.image_sets import read_images, read_pixels
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.settings.images import ImageReading

RED = (255, 0, 0)


def picture(path, value=0, size=(4, 3), **options) -> Path:
    """A file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3 if isinstance(value, int) else value).save(path, **options)
    return path


def values(source, **reading) -> list[int]:
    """The byte of each of a set of images of one colour."""
    return read_pixels(str(source), ImageReading(**reading)).flatten(1)[:, 0].tolist()


def noise(width, height, seed=0):
    """Of middle brightness: nothing that a filter makes of it is cut off at black or white."""
    random = np.random.default_rng(seed).integers(70, 186, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(random)


# --- folders --------------------------------------------------------------------------------------


def test_folders_in_folders_are_read_in_the_order_of_their_paths(tmp_path):
    for number, name in enumerate(("a/z.png", "b/c/d.jpg", "b/e.PNG", "f.bmp")):
        picture(tmp_path / name, 10 * number, **({"quality": 100} if "jpg" in name else {}))
    for name in (".hidden/x.png", "a/._z.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "b" / "list.txt").write_text("1")
    assert values(tmp_path) == [0, 10, 20, 30]
    assert values(f"{tmp_path}#1:3") == [10, 20]
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert values(tmp_path) == [0, 10, 20, 30]
    picture(tmp_path.parent / f"{tmp_path.name}-far" / "y.png", 40)
    (tmp_path / "g").symlink_to(f"{tmp_path}-far")
    assert values(tmp_path) == [0, 10, 20, 30, 40]


def test_a_split_is_the_folder_of_its_name_and_train_goes_without_saying(tmp_path):
    for number, name in enumerate(("train/cat/a.png", "train/dog/b.png", "test/cat/c.png")):
        picture(tmp_path / name, number)
    assert values(tmp_path) == values(f"{tmp_path}@train") == [0, 1]
    assert values(f"{tmp_path}@test") == values(tmp_path / "test") == [2]
    assert values(f"{tmp_path}@train/dog") == [1]
    assert values(f"{tmp_path}@train#1:") == [1]
    with pytest.raises(MissingInputError, match="has no folder val"):
        read_pixels(f"{tmp_path}@val")
    picture(tmp_path.parent / f"{tmp_path.name}@home" / "a.png", 7)
    assert values(f"{tmp_path}@home") == [7]  # a folder of that very name


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height", "left", "top"), [(178, 218, 0, 4), (50, 33, 8, 0)])
def test_resize_is_an_antialiased_bicubic_filter_and_crop_the_middle(
    tmp_path, width, height, left, top
):
    """As torch computes both, in floats, up to rounding."""
    image = noise(width, height)
    image.save(tmp_path / "a.png")
    short = min(width, height)
    size = (32 * height // short, 32 * width // short)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    smaller = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
    found = read_pixels(str(tmp_path), ImageReading(resize=32))
    assert found.shape == (1, 3, *size)
    assert (found - smaller.clamp(0, 255)).abs().max() < 2
    aliased = torch.nn.functional.interpolate(planes, size, mode="bicubic")
    assert (found - aliased.clamp(0, 255)).abs().max() > 8
    cut = read_pixels(str(tmp_path), ImageReading(resize=32, crop=32))
    assert torch.equal(cut, found[..., top : top + 32, left : left + 32])


def test_images_of_several_sizes_become_one_size(tmp_path):
    noise(40, 60).save(tmp_path / "a.png")
    noise(70, 50).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"there are 40x60 and 70x50, as .*b.png: --resize N and"):
        read_pixels(str(tmp_path))
    with pytest.raises(DataError, match="there are 32x48 and 44x32"):
        read_pixels(str(tmp_path), ImageReading(resize=32))
    assert read_pixels(str(tmp_path), ImageReading(crop=30)).shape == (2, 3, 30, 30)
    found = read_pixels(str(tmp_path), ImageReading(resize=32, crop=24, gray=True))
    assert found.shape == (2, 1, 24, 24)
    colour = read_pixels(str(tmp_path), ImageReading(resize=32, crop=24)).double()
    luminance = colour.permute(0, 2, 3, 1) @ torch.tensor([0.299, 0.587, 0.114]).double()
    assert (found[:, 0] - luminance).abs().max() < 1  # after resizing, not before


def test_nothing_is_enlarged(tmp_path):
    picture(tmp_path / "small.png", size=(20, 31))
    with pytest.raises(DataError, match=r"small.png: 20x31 is smaller than --resize 32"):
        read_pixels(str(tmp_path), ImageReading(resize=32))
    with pytest.raises(DataError, match="20x31 is smaller than --crop 21"):
        read_pixels(str(tmp_path), ImageReading(crop=21))
    assert read_pixels(str(tmp_path), ImageReading(resize=20)).shape == (1, 3, 31, 20)
    with pytest.raises(UsageError, match="--crop 33 is more than --resize 32 leaves"):
        ImageReading(resize=32, crop=33)


# --- kinds of images ------------------------------------------------------------------------------


def test_every_kind_of_image_becomes_rgb(tmp_path):
    """Palettes are looked up, 16 bits reduced, and white stands behind what is transparent."""
    half = Image.new("RGBA", (4, 3), (*RED, 51))  # a fifth of red
    wanted = {
        "1": (Image.new("1", (4, 3), 1), (255, 255, 255)),
        "L": (Image.new("L", (4, 3), 70), (70, 70, 70)),
        "P": (Image.new("RGB", (4, 3), RED).quantize(4), RED),
        "I;16": (Image.fromarray(np.full((3, 4), 257 * 80, np.uint16)), (80, 80, 80)),
        "RGBA": (half, (255, 204, 204)),
        "LA": (Image.new("LA", (4, 3), (0, 0)), (255, 255, 255)),
    }
    for name, (image, colour) in wanted.items():
        image.save(tmp_path / "a.png")
        assert read_pixels(str(tmp_path))[0, :, 0, 0].tolist() == list(colour), name


def test_images_are_turned_as_their_exif_says(tmp_path):
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    found = read_images(str(tmp_path))
    assert found.shape == (1, 3, 32, 16)
    assert found[..., 2, :].min() > 0.9  # and so above
    assert found[..., 29, :].max() < -0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not an image"), (b"<svg/>", "is not an image"), ("half", "cannot be decoded")],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    picture(tmp_path / "a.png")
    noise(64, 64).save(tmp_path / "whole.jpg")
    if content == "half":
        content = (tmp_path / "whole.jpg").read_bytes()[:900]
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "b" / "broken.jpg").parent.mkdir()
    (tmp_path / "b" / "broken.jpg").write_bytes(content)
    with pytest.raises(DataError, match=f"b/broken.jpg {message}"):
        read_pixels(str(tmp_path))
    assert values(f"{tmp_path}#:1") == [0]  # what is not taken is not decoded
    done = invoke("distill", "teacher", str(tmp_path), "-o", str(tmp_path / "run"))
    assert done.exit_code == 65
    assert done.stderr.count("\n") == 1


# --- data sets ------------------------------------------------------------------------------------


def cifar(folder, name, splits, labels=("label",)):
    """Parquet files in the schema of the data set on the hub; the image of a row has its number."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    kinds = datasets.ClassLabel(names=["airplane", "automobile"])
    features = datasets.Features({"img": datasets.Image(), **dict.fromkeys(labels, kinds)})
    made = {}
    for split, numbers in splits.items():
        rows = []
        for number in numbers:
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (number,) * 3).save(stream, "PNG")
            image = {"bytes": stream.getvalue(), "path": None}
            rows.append({"img": image, **dict.fromkeys(labels, number % 2)})
        made[split] = datasets.Dataset.from_list(rows, features=features)
        file = folder / name / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        made[split].to_parquet(str(file))
    return datasets.DatasetDict(made)


def test_cifar_is_read_from_parquet_files_and_from_what_was_saved(tmp_path):
    from pyarrow import parquet

    made = cifar(tmp_path, "plain_text", {"train": range(5), "test": range(5, 8)})
    train = tmp_path / "plain_text" / "train-00000-of-00001.parquet"
    assert parquet.read_schema(train).names == ["img", "label"]
    assert read_images(str(train)).shape == (5, 3, 32, 32)
    assert values(train) == [0, 1, 2, 3, 4]
    assert values(f"{train}#1:3") == [1, 2]
    for source in (tmp_path / "plain_text", tmp_path / "saved"):
        if source.name == "saved":
            made.save_to_disk(source)
        picture(source / "banner.png")  # of the page on the hub
        assert values(source) == values(f"{source}@train") == [0, 1, 2, 3, 4]
        assert values(f"{source}@test") == [5, 6, 7]
        assert values(f"{source}@test#:2") == [5, 6]
        assert values(f"{source}@test#2:") == [7]
        assert values(f"{source}@test", resize=8, crop=8) == [5, 6, 7]
        with pytest.raises(DataError, match=r"(Unknown|no) split \W?dev.*train.*test"):
            read_pixels(f"{source}@dev")
        with pytest.raises(UsageError, match=r"#3:.*is empty: .* has 3 images"):
            read_pixels(f"{source}@test#3:")
    with pytest.raises(UsageError, match="is a file and has no splits: leave out @test"):
        read_pixels(f"{train}@test")
    with pytest.raises(UsageError, match="without configurations: leave out plain_text/"):
        read_pixels(f"{tmp_path}/saved@plain_text/test")
    made["test"].save_to_disk(tmp_path / "alone")
    assert values(tmp_path / "alone") == [5, 6, 7]
    with pytest.raises(UsageError, match=r"has one split, .*: leave out @"):
        read_pixels(f"{tmp_path}/alone@train")
    for name in ("builtin:digits", "a.safetensors"):
        with pytest.raises(UsageError, match="has no splits: leave out @test"):
            read_pixels(f"{name}@test")


def test_data_sets_of_the_hub_are_named_with_configuration_and_split(tmp_path):
    """From the cache, where `datasets` keeps what it has downloaded."""
    pytest.importorskip("datasets")
    from datasets.packaged_modules.parquet.parquet import Parquet

    for name, config, labels in (
        ("uoft-cs/cifar10", "plain_text", ("label",)),
        ("uoft-cs/cifar100", "cifar100", ("fine_label", "coarse_label")),
    ):
        cifar(tmp_path, config, {"train": range(5), "test": range(5, 8)}, labels)
        files = {s: [str(next((tmp_path / config).glob(f"{s}-*")))] for s in ("train", "test")}
        place = tmp_path / "hub/datasets" / name.replace("/", "___") / config / "0.0.0" / ("0" * 40)
        builder = Parquet(str(tmp_path / "made"), name.split("/")[1], config, data_files=files)
        builder.download_and_prepare(str(place))
    small = "--network mlp --width 4 --blocks 1 --steps 1 -b 2 --checkpoints 1 -q"
    line = " && ".join(
        f"dlmctl distill teacher '{source}' -o {run} {small}"
        for run, source in (
            ("ten", "uoft-cs/cifar10@test#1:3"),
            ("hundred", "uoft-cs/cifar100@cifar100/train"),
        )
    )
    done = shell(line, tmp_path, more={"HF_HOME": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr
    for run, numbers in (("ten", (6, 7)), ("hundred", range(5))):
        about = json.loads((tmp_path / run / "latest" / "config.json").read_text())
        for number in numbers:
            picture(tmp_path / f"as-{run}" / f"{number}.png", number, (32, 32))
        same = f"dlmctl distill teacher as-{run} -o as-{run}-run {small}"
        assert shell(same, tmp_path).returncode == 0
        other = json.loads((tmp_path / f"as-{run}-run/latest/config.json").read_text())
        assert about["training"]["images_hash"] == other["training"]["images_hash"]


def test_of_rows_with_several_images_a_part_is_cut_by_images(tmp_path):
    for number in range(5):
        picture(tmp_path / f"{number}.png", number)
    rows = [{"images": ["0.png", "1.png"]}, {"images": ["2.png"]}, {"images": ["3.png", "4.png"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for begin in range(5):
        for end in range(begin + 1, 6):
            assert values(f"{tmp_path}/rows.jsonl#{begin}:{end}") == list(range(begin, end))
    with pytest.raises(UsageError, match=r"#5: is empty: .* has 5 images"):
        read_pixels(f"{tmp_path}/rows.jsonl#5:")
    with pytest.raises(UsageError, match=r"#3:2 is empty$"):
        read_pixels(f"{tmp_path}/rows.jsonl#3:2")
