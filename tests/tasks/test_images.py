"""Images from everywhere: the same pixels, and one clear line for what is none."""

import base64
import io
import struct
import sys
import zlib

import pytest
from conftest import invoke, read_jsonl
from PIL import Image

from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.records.jsonl import Record, dump
from dlmctl.tasks import images
from dlmctl.tasks.images import as_data_uri, image_hash, load_image, record_images
from dlmctl.tasks.sources import prompts


def picture(size=(5, 3)):
    image = Image.new("RGB", size)
    image.putdata([(40 * x, 60 * y, 7) for y in range(size[1]) for x in range(size[0])])
    return image


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width, height):
    """A PNG that has nothing but a header of this size, checksums right."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def test_every_source_gives_the_same_pixels(tmp_path):
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        str(tmp_path / "a.png"),
        data,
        as_data_uri(data),
        as_data_uri(picture()),
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        picture(),
    ]
    assert {image_hash(load_image(source)) for source in sources} == {image_hash(picture())}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats_of_pixels_are_read_and_named_in_a_data_uri(kind):
    data = encoded(picture(), kind)
    uri = as_data_uri(data)
    assert uri.startswith(f"data:image/{kind.lower()};base64,")
    assert base64.b64decode(uri.partition(",")[2]) == data  # not encoded anew
    image = load_image(uri)
    assert (image.mode, image.size) == ("RGB", (5, 3))


def test_transparency_is_white_and_exif_turns():
    seen = picture().convert("RGBA")
    seen.putpixel((0, 0), (255, 0, 0, 0))
    seen.putpixel((1, 0), (0, 0, 0, 128))
    pixels = load_image(encoded(seen))
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert pixels.getpixel((1, 0)) == (127, 127, 127)
    assert pixels.getpixel((4, 2)) == picture().getpixel((4, 2))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert load_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = load_image(encoded(picture(), exif=exif))
    assert turned.tobytes() == picture().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_grey_of_sixteen_bits_keeps_its_brightness():
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 65535)
    deep.putpixel((1, 0), 32896)
    loaded = load_image(encoded(deep))
    assert [loaded.getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]


def test_the_first_frame_of_several_is_taken():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_the_digest_is_of_size_and_pixels():
    wide = picture((6, 2))
    assert image_hash(wide) != image_hash(Image.frombytes("RGB", (3, 4), wide.tobytes()))
    other = picture()
    other.putpixel((4, 2), (0, 0, 0))
    assert image_hash(other) != image_hash(picture())


BOMB = png_header(30_000, 30_000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.png", encoded(picture((60, 60)))[:-40], "cut.png cannot be decoded"),
        ("cut.jpg", encoded(picture((60, 60)), "JPEG")[:-300], "cut.jpg cannot be decoded"),
        ("head.png", encoded(picture())[:20], "head.png"),
        ("short.png", png_header(50, 50), "short.png cannot be decoded"),
        ("text.png", b"not an image at all", "text.png is not an image in one of the formats PNG"),
        ("empty.png", b"", "empty.png is not an image"),
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.svg is not an image"),
        ("x.ppm", encoded(picture(), "PPM"), "x.ppm is not an image"),
        ("x.tiff", encoded(picture(), "TIFF"), "x.tiff is not an image"),
        ("bomb.png", BOMB, "bomb.png has more than 64000000 pixels"),
        ("large.png", png_header(8001, 8000), "has 8001 x 8000 pixels, more than 64000000"),
    ],
)
def test_files_that_are_no_image_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for source in (str(tmp_path / name), {"bytes": content, "path": name}, as_data_uri(content)):
        with pytest.raises(DataError) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)
        if source == str(tmp_path / name):
            assert message in str(caught.value)


def test_a_bomb_is_refused_before_its_pixels_are_made(monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for header in (BOMB, png_header(8001, 8000)):
        with pytest.raises(DataError, match="pixels"):
            load_image(header)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.png", "there is no image file no/such.png"),
        (".", "there is no image file"),
        ("a\0b.png", "image"),
        ("x" * 5000, "cannot read the image"),
        ("https://example.org/a.png", "images are not fetched from the network"),
        ("file:///etc/passwd", "is an address"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png,abc", "is not data:image/...;base64"),
        ("data:image/png;base64", "is not data:image/...;base64"),
        ({"bytes": None, "path": None}, "neither 'bytes' nor 'path'"),
        (3, "not int"),
    ],
)
def test_sources_that_cannot_be_used_are_named(source, message):
    with pytest.raises(DataError) as caught:
        load_image(source)
    assert message in str(caught.value)


def test_what_is_too_long_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", 50)
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    with pytest.raises(DataError, match=r"a\.png has more than 50 bytes"):
        load_image(str(tmp_path / "a.png"))
    with pytest.raises(DataError, match="more than 50"):
        load_image(as_data_uri(picture()))


def test_without_pillow_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnavailableError, match=r"pip install 'dlmctl\[vision\]'"):
        load_image("a.png")
    done = invoke("prompts", "shapes")
    assert done.exit_code == 69
    assert "drawing scenes needs the package pillow" in done.stderr


def test_images_of_a_record_are_found_beside_its_file(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    picture().save(folder / "a.png")
    record = Record(images=["a.png", as_data_uri(picture((2, 2)))])
    record.where = f"{folder}/rows.jsonl:3"
    assert [image.size for image in record_images(record)] == [(5, 3), (2, 2)]
    monkeypatch.chdir(tmp_path)
    picture((1, 1)).save("a.png")  # the current folder comes first
    assert record_images(record)[0].size == (1, 1)
    assert record_images(Record(image="data/a.png"))[0].size == (5, 3)
    assert record_images(Record(prompt="none")) == []
    record["images"][1] = "gone.png"
    with pytest.raises(DataError, match=r"rows\.jsonl:3: image 2 of 2: there is no image file"):
        record_images(record)


def rows_with_images(tmp_path, write):
    data = encoded(picture(), "JPEG")  # no encoder gives these bytes again after decoding
    cell = {"bytes": data, "path": None}
    return write(
        tmp_path, [{"problem": "<image>Find x.", "images": [cell], "answer": "3"}] * 2, data
    )


def as_parquet(tmp_path, rows, data):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def as_saved(tmp_path, rows, data):
    import datasets

    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "answer": datasets.Value("string"),
        }
    )
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def as_jsonl(tmp_path, rows, data):
    lines = [dump({**row, "images": [as_data_uri(data)]}) for row in rows]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    return tmp_path / "x.jsonl"


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_jsonl])
def test_every_format_of_rows_gives_the_stored_bytes_undecoded(tmp_path, write, monkeypatch):
    path = rows_with_images(tmp_path, write)
    monkeypatch.setattr(images, "_pillow", lambda: pytest.fail("decoded"))
    records = list(prompts(str(path)))
    assert len(records) == 2
    for record in records:
        assert list(record)[:3] == ["id", "task", "prompt"]
        assert (record["task"], record["prompt"]) == ("vqa", "<image>Find x.")
        assert record["answer"] == "3"
        assert record["images"] == [as_data_uri(encoded(picture(), "JPEG"))]
        assert "problem" not in record


def test_paths_are_completed_from_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    picture().save(tmp_path / "data" / "a.png")
    row = {"question": "what?", "image": "a.png", "answers": ["a dog"]}
    (tmp_path / "data" / "x.jsonl").write_bytes(dump(row))
    monkeypatch.chdir(tmp_path)
    assert invoke("prompts", "data/x.jsonl", "-o", "out.jsonl").exit_code == 0
    [record] = read_jsonl(tmp_path / "out.jsonl")
    assert record["images"] == ["data/a.png"]
    assert record["prompt"] == "<image>what?"
    assert "image" not in record
    assert record_images(record)[0].size == (5, 3)


def one(row, **options):
    from dlmctl.tasks.columns import to_record

    return to_record(Record(row), {}, None, options.get("style", "plain"))


def test_each_image_has_a_mark():
    two = ["a.png", "b.png"]
    assert one({"prompt": "p <image> q", "images": two})["prompt"] == "<image>p <image> q"
    assert one({"prompt": "p", "images": two})["prompt"] == "<image><image>p"
    assert one({"prompt": "<image><image>p", "images": two})["prompt"] == "<image><image>p"
    with pytest.raises(DataError, match="has 3 marks <image> for 2 images"):
        one({"prompt": "<image>" * 3, "images": two})
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    messages = one({"messages": asked, "images": ["a.png"]})["messages"]
    assert messages == [asked[0], {"role": "user", "content": "<image>q"}]
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    messages = one({"messages": [{"role": "user", "content": parts}], "images": two})["messages"]
    assert messages[0]["content"] == [{"type": "image"}, *parts]
    assert asked[1]["content"] == "q"  # the row itself is left alone


@pytest.mark.parametrize(
    "messages", [3, ["q"], [{"content": 3}], [{"content": ["q"]}], [{"content": [None]}]]
)
def test_messages_that_are_none_are_refused(messages):
    with pytest.raises(DataError, match="neither text nor a list of messages"):
        one({"messages": messages, "images": ["a"]})


def test_the_task_comes_from_the_data_and_identity_from_the_images_too():
    first = one({"problem": "Find x.", "images": ["a.png"], "answer": "1"})
    second = one({"problem": "Find x.", "images": ["b.png"], "answer": "1"})
    assert first["id"] != second["id"]
    known = one({"problem": "p", "images": ["a.png"], "answer": "1", "task": "mine", "id": 7})
    assert (known["task"], known["id"]) == ("mine", 7)
    verl = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>q"}],
        "images": [{"bytes": b"BMxx", "path": None}],
        "reward_model": {"ground_truth": "4"},
    }
    record = one(verl)
    assert (record["task"], record["answer"]) == ("geometry3k", "4")
    assert record["images"][0].startswith("data:image/bmp;base64,")
    text_only = one({"problem": "p", "images": [], "answer": "1"})
    assert text_only["task"] == "math"


def test_instructions_ask_for_the_layout():
    record = one({"problem": "<image>Find x.", "images": ["a"], "answer": "1"}, style="instruct")
    assert record["prompt"].startswith("<image>Find x.\n")
    for part in ("<description>", "</think>", r"\boxed{...}"):
        assert part in record["prompt"]
