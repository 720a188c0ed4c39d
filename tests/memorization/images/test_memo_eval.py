"""`memo-eval`: real digits with a held-out set, duplicates, features, and a picture of them."""

import io

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl
from PIL import Image
from safetensors.torch import save_file

from dlmctl.distill.image_sets import read_images, write_images

TRAIN, HELDOUT = "builtin:digits#0:100", "builtin:digits#100:200"


def save(path, images) -> str:
    write_images(path, images)
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Noisy copies of half of the training set, and as many other digits."""
    directory = tmp_path_factory.mktemp("sets")
    train, fresh = read_images(TRAIN), read_images("builtin:digits#300:350")
    both = torch.cat([train[:50], fresh])
    noise = torch.randn(both.shape, generator=torch.Generator().manual_seed(0))
    return save(directory / "half.safetensors", both + 0.05 * noise), directory


def evaluate(*arguments, under=("samples",)) -> dict:
    done = invoke("memo-eval", *under, *arguments)
    assert done.exit_code == 0, done.stderr
    [line] = done.stdout.splitlines()
    return {**orjson.loads(line), "stderr": done.stderr}


def refused(code, *arguments) -> str:
    done = invoke("memo-eval", *arguments)
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_half_of_the_samples_are_copies(sets):
    row = evaluate("--samples", sets[0], "--train", TRAIN, "--heldout", HELDOUT)
    assert (row["samples"], row["train"], row["heldout"]) == (100, 100, 100)
    assert row["f_mem"] == pytest.approx(0.5, abs=0.02)
    assert row["f_mem_interval"][0] < row["f_mem"] < row["f_mem_interval"][1]
    assert row["heldout_f_mem"] == 0
    assert row["f_mem_excess"] == pytest.approx(row["f_mem"])
    assert row["d1"] < 0.8 * row["heldout_d1"]
    assert row["fd"] < row["heldout_fd"]
    assert row["mmd2_gap"] == pytest.approx(row["mmd2"] - row["heldout_mmd2"])
    assert row["mmd2_gap"] < 0
    assert row["space"] == "pca:25"
    # Every figure is there for both sets.
    for name in ("f_mem", "ratio", "d1", "precision", "recall", "density", "coverage"):
        for prefix in ("", "heldout_"):
            low, high = row[f"{prefix}{name}_interval"]
            assert low <= row[f"{prefix}{name}"] <= high


def test_plain_options_mean_samples(sets):
    given = ("--samples", sets[0], "--train", TRAIN, "--no-quality")
    assert evaluate(*given, under=()) == evaluate(*given)


def test_fresh_digits_are_no_copies():
    row = evaluate("--samples", "builtin:digits#400:600", "--train", TRAIN, "--heldout", HELDOUT)
    assert row["f_mem"] < 0.02
    assert row["heldout_f_mem"] < 0.02
    low, high = row["f_mem_excess_interval"]
    assert low <= 0 <= high
    assert row["mmd2_gap_p"] > 0.01


def test_exchanging_the_sets_exchanges_the_figures(sets):
    one = evaluate("--samples", sets[0], "--train", TRAIN, "--heldout", HELDOUT)
    two = evaluate("--samples", sets[0], "--train", HELDOUT, "--heldout", TRAIN)
    names = [name for name in one if f"heldout_{name}" in one]
    assert {"fd", "mmd2", "precision", "f_mem_interval"} <= set(names)
    for name in names:
        assert one[name] == pytest.approx(two[f"heldout_{name}"], rel=1e-6, abs=1e-9), name
        assert two[name] == pytest.approx(one[f"heldout_{name}"], rel=1e-6, abs=1e-9), name


def test_order_and_memory_do_not_matter(sets, tmp_path):
    samples, train = read_images(sets[0]), read_images(TRAIN)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randperm(100, generator=generator), torch.randperm(100, generator=generator)
    shuffled = (
        save(tmp_path / "x.safetensors", samples[x]),
        save(tmp_path / "y.safetensors", train[y]),
    )
    rows = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one = evaluate("--samples", sets[0], "--train", TRAIN, "--rows", rows[0])
    two = evaluate(
        "--samples", shuffled[0], "--train", shuffled[1], "--rows", rows[1], "--memory", "64K"
    )
    for name in ("f_mem", "ratio", "d1", "d1_p05", "fd", "precision", "recall", "density", "mmd2"):
        assert one[name] == pytest.approx(two[name], rel=1e-9, abs=1e-12), name
    first, second = read_jsonl(rows[0]), read_jsonl(rows[1])
    for number, row in enumerate(second):
        other = first[int(x[number])]
        assert (row["d1"], row["d2"]) == pytest.approx((other["d1"], other["d2"]))
        assert int(y[row["nn"]]) == other["nn"]


def test_rows_say_what_each_sample_is_near(sets, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = evaluate(
        "--samples", sets[0], "--train", TRAIN, "--no-quality", "--rows", file, "--threshold", 0.4
    )
    rows = read_jsonl(file)
    assert [each["id"] for each in rows] == list(range(100))
    assert [each["nn"] for each in rows[:50]] == list(range(50))
    assert sum(each["memorized"] for each in rows) / 100 == row["f_mem"]
    for each in rows:
        assert each["ratio"] == pytest.approx(each["d1"] / each["d2"])
        assert each["memorized"] == (each["ratio"] < 0.4)
    flat, one = read_images(sets[0])[0].flatten(), read_images(TRAIN)[0].flatten()
    assert rows[0]["d1"] == pytest.approx(float((flat - one).norm()), rel=1e-6)
    near = evaluate("--samples", sets[0], "--train", TRAIN, "--no-quality", "--distance", 0.6)
    assert near["f_near"] == pytest.approx(sum(each["d1"] <= 0.6 for each in rows) / 100)
    assert near["f_near"] == pytest.approx(0.5, abs=0.02)


def test_duplicates_hide_copies_until_they_are_left_out(tmp_path):
    train = read_images(TRAIN)
    twice = save(tmp_path / "twice.safetensors", torch.cat([train, train]))
    given = ("--samples", TRAIN, "--train", twice, "--no-quality")
    row = evaluate(*given)
    assert (row["f_mem"], row["duplicates"], row["train"]) == (0, 100, 200)
    assert "--train has 100 duplicates" in row["stderr"]
    assert "--dedup" in row["stderr"]
    row = evaluate(*given, "--dedup", "--heldout", HELDOUT)
    assert (row["f_mem"], row["duplicates"], row["train"]) == (1, 100, 100)
    assert (row["heldout_f_mem"], row["heldout_duplicates"]) == (0, 0)
    near = save(tmp_path / "near.safetensors", torch.cat([train[:50] + 1e-4, train]))
    noisy = save(tmp_path / "noisy.safetensors", train + 0.01 * torch.randn(train.shape))
    given = ("--samples", noisy, "--train", near, "--no-quality", "--dedup")
    assert evaluate(*given)["f_mem"] == 0.5
    rows = tmp_path / "rows.jsonl"
    assert evaluate(*given, "--dedup-within", 0.01, "--rows", rows)["f_mem"] == 1
    assert [each["nn"] for each in read_jsonl(rows)] == [*range(50), *range(100, 150)]


def test_of_a_longer_held_out_set_distances_take_a_part_and_quality_all(sets):
    given = ("--samples", sets[0], "--train", TRAIN, "--heldout")
    row = evaluate(*given, "builtin:digits#100:333")
    assert (row["heldout"], row["unseen"]) == (100, 233)
    assert "233 images: distances are to the first 100" in row.pop("stderr")
    part = evaluate(*given, HELDOUT)
    assert part.pop("stderr") == ""
    assert part["unseen"] == 100
    for name in ("heldout_f_mem", "heldout_ratio", "heldout_d1_interval", "f_mem", "d1"):
        assert row[name] == part[name]
    for name in ("heldout_fd", "heldout_recall", "heldout_coverage"):
        assert row[name] != part[name]
    # The principal components are those of all, with which the rest is compared here.
    pixels = ("--space", "pixels", "--ridge", "1e-3")
    row = evaluate(*given, "builtin:digits#100:333", *pixels)
    alone = evaluate("--samples", sets[0], "--train", "builtin:digits#100:333", *pixels)
    for name in ("fd", "fd_se", "precision", "recall", "density", "coverage"):
        assert row[f"heldout_{name}"] == pytest.approx(alone[name])
    assert row["fd"] == pytest.approx(evaluate(*given[:4], *pixels)["fd"])


def test_of_a_shorter_held_out_set_there_is_a_warning(sets):
    given = ("--samples", sets[0], "--train", TRAIN, "--heldout")
    row = evaluate(*given, "builtin:digits#100:150")
    assert row["heldout"] == row["unseen"] == 50
    assert row["mmd2_gap_p"] is None
    assert "--heldout has 50 images and --train 100" in row["stderr"]
    row = evaluate(*given, "builtin:digits#90:190", "--no-quality")
    assert "10 of the held-out images are in --train, too" in row["stderr"]


def test_labels_join_rows_that_stats_and_plot_read(sets, tmp_path):
    file = tmp_path / "memo.jsonl"
    with file.open("wb") as stream:
        for role, cut in (("teacher", ":50"), ("student", "50:")):
            row = evaluate(
                "--samples", f"{sets[0]}#{cut}", "--train", TRAIN, "--no-quality",
                "--set", f"role={role}", "--set", "n=128",
            )  # fmt: skip
            assert list(row)[:2] == ["role", "n"]
            assert row["n"] == 128
            row.pop("stderr")
            stream.write(orjson.dumps(row) + b"\n")
    done = invoke("stats", "--by", "role", file)
    rows = {row["role"]: row for row in map(orjson.loads, done.stdout.splitlines())}
    assert rows["teacher"]["f_mem"] == pytest.approx(1, abs=0.03)
    assert rows["student"]["f_mem"] < 0.03
    done = invoke("plot", file, "-x", "n", "-y", "f_mem", "--by", "role", "-o", tmp_path / "a.svg")
    assert done.exit_code == 0, done.stderr


def test_several_sets_give_a_record_each(sets, tmp_path):
    written = tmp_path / "by-a-sampler.safetensors"
    about = {"model": "runs/a", "step": "800", "steps": "1", "evaluations": "1", "seed": "3"}
    write_images(written, read_images(sets[0]), about)
    given = ("--train", TRAIN, "--heldout", HELDOUT, "--no-quality", "--bootstrap", "20")
    done = invoke(
        "memo-eval", "--samples", written, "--samples", f"{sets[0]}#:50", *given, "--set", "steps=9"
    )
    first, second = map(orjson.loads, done.stdout.splitlines())
    assert {name: first[name] for name in ("model", "step", "steps", "evaluations")} == {
        "model": "runs/a", "step": 800, "steps": 9, "evaluations": 1,
    }  # fmt: skip
    assert "seed" not in first
    assert "step" not in second
    for row, name in ((first, written), (second, f"{sets[0]}#:50")):
        alone = evaluate("--samples", name, *given, "--set", "steps=9")
        alone.pop("stderr")
        assert row == alone
    message = refused(2, "--samples", written, "--samples", sets[0], *given, "--rows", "r.jsonl")
    assert "are for one --samples" in message


def test_features_of_files_are_compared_by_cosine(tmp_path):
    generator = torch.Generator().manual_seed(2)
    train = torch.randn(100, 16, generator=generator)
    samples = torch.cat([3 * train[:30], torch.randn(70, 16, generator=generator)])
    heldout = torch.randn(120, 16, generator=generator)
    files = [
        save(tmp_path / f"{name}.safetensors", each)
        for name, each in (("s", samples), ("t", train), ("h", heldout))
    ]
    row = evaluate(
        "--samples", "builtin:digits#300:400", "--train", TRAIN, "--heldout",
        "builtin:digits#100:220", "--features", ",".join(files), "--copy-threshold", "0.5,0.99",
    )  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(samples[:, None], train[None], dim=2).amax(1)
    assert row["sim"] == pytest.approx(float(cosine.mean()), abs=1e-6)
    assert row["sim_max"] == pytest.approx(1, abs=1e-6)
    assert row["sim_p95"] == pytest.approx(float(cosine.double().quantile(0.95)), abs=1e-6)
    assert row["sim_over_0.99"] == pytest.approx(0.3)
    assert row["heldout_sim_over_0.99"] == 0
    # The held-out set was cut, and its features with it.
    cosine = torch.nn.functional.cosine_similarity(samples[:, None], heldout[None, :100], dim=2)
    assert row["heldout_sim"] == pytest.approx(float(cosine.amax(1).mean()), abs=1e-6)
    assert row["space"] == "features"
    short = refused(
        65, "--samples", TRAIN, "--train", HELDOUT, "--features", f"{files[0]},{files[2]}"
    )
    assert "of --train there have to be features [100, F]" in short
    assert "takes 2 files here" in refused(
        2, "--samples", TRAIN, "--train", HELDOUT, "--features", files[0]
    )


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("vit")
    ViTModel(config).save_pretrained(directory)
    return directory


def test_an_extractor_gives_features_of_images(sets, extractor):
    from dlmctl.memorization.images.image_encoder import ImageEncoder

    row = evaluate(
        "--samples", sets[0], "--train", TRAIN, "--heldout", HELDOUT, "--extractor", extractor,
        "--no-quality",
    )  # fmt: skip
    extract = ImageEncoder(extractor, torch.device("cpu"))
    x, y = extract(read_images(sets[0])), extract(read_images(TRAIN), batch_size=7)
    assert x.shape == (100, 16)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2).amax(1)
    assert row["sim"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert row["sim"] > row["heldout_sim"]
    # Gray is three equal channels, and mean and standard deviation are those of the folder.
    colour = read_images(TRAIN)[:3].expand(-1, 3, -1, -1)
    torch.testing.assert_close(extract(colour), y[:3], rtol=1e-4, atol=1e-5)
    (extractor / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}'
    )
    pale = read_images(TRAIN)[:3] / 2  # so that no resized pixel is cut off
    halved = ImageEncoder(extractor, torch.device("cpu"))(pale)
    torch.testing.assert_close(halved, extract(pale / 2), rtol=1e-4, atol=1e-5)


def test_copies_are_found_whatever_the_range_of_the_floats(tmp_path):
    levels = torch.randint(256, (60, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    train = tmp_path / "train.safetensors"
    save_file({"images": levels.byte()}, train)
    for name, copies in (("unit", levels / 255), ("both", levels / 127.5 - 1)):
        samples = tmp_path / f"{name}.safetensors"
        save_file({"images": copies[:30].float()}, samples)
        row = evaluate("--samples", samples, "--train", train, "--no-quality")
        assert row["f_mem"] == 1.0
    assert "are in one range" in refused(
        65, "--samples", tmp_path / "unit.safetensors", "--train", tmp_path / "both.safetensors"
    )


def test_an_extractor_that_is_none_is_refused(sets, extractor, tmp_path):
    given = ("--samples", sets[0], "--train", TRAIN, "--extractor")
    assert "has no config.json" in refused(66, *given, tmp_path)
    (tmp_path / "config.json").write_text((extractor / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pickled weights, which are not read" in refused(65, *given, tmp_path)
    vectors = save(tmp_path / "v.safetensors", torch.randn(50, 4))
    message = refused(2, "--samples", vectors, "--train", vectors, "--extractor", extractor)
    assert "takes images" in message


@pytest.mark.parametrize("spread", [False, True])
def test_the_gallery_shows_the_pixels_as_they_are(sets, tmp_path, spread):
    file = tmp_path / "copies.png"
    evaluate(
        "--samples", sets[0], "--train", TRAIN, "--heldout", HELDOUT, "--no-quality",
        "--gallery", file, "--gallery-rows", 5, *(["--gallery-spread"] if spread else []),
    )  # fmt: skip
    drawn = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
    assert drawn.width > 400
    assert drawn.height > 400
    red = sum(count for count, (r, g, b) in drawn.getcolors(2**20) if r > 150 and g < 90 and b < 90)
    assert red > 500  # frames of copies


def test_which_samples_the_gallery_takes():
    from dlmctl.memorization.images.gallery import chosen

    tests = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    assert chosen(tests, 3, spread=False) == [1, 3, 0]
    assert chosen(tests, 3, spread=True) == [1, 0, 2]
    assert chosen(tests, 9, spread=True) == [1, 3, 0, 4, 2]


def test_colour_images_are_drawn_and_vectors_are_not(tmp_path):
    colours = save(tmp_path / "c.safetensors", torch.rand(12, 3, 6, 6) * 2 - 1)
    given = (
        "--samples",
        colours,
        "--train",
        colours,
        "--no-quality",
        "--gallery",
        tmp_path / "c.png",
    )
    evaluate(*given)
    assert (tmp_path / "c.png").stat().st_size > 5000
    vectors = save(tmp_path / "v.safetensors", torch.randn(12, 4))
    given = (
        "--samples",
        vectors,
        "--train",
        vectors,
        "--no-quality",
        "--gallery",
        tmp_path / "v.png",
    )
    assert "--gallery draws images" in refused(2, *given)


def test_spaces_of_quality(sets):
    given = ("--samples", sets[0], "--train", TRAIN)
    assert evaluate(*given, "--space", "pca:3")["space"] == "pca:3"
    assert "--ridge 1e-6" in refused(65, *given, "--space", "pixels")  # corners are always black
    assert evaluate(*given, "--space", "pixels", "--ridge", 1e-3)["space"] == "pixels"
    assert "is none of" in refused(2, *given, "--space", "dct")
    assert "needs --extractor" in refused(2, *given, "--space", "features")
    few = refused(65, "--samples", f"{sets[0]}#:20", "--train", TRAIN, "--space", "pca:32")
    assert "the covariance of 20 --samples in 32 dimensions is singular" in few


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["--set", "role"], "--set role is not NAME=VALUE"),
        (2, ["--set", "f_mem=1", "--no-quality"], "the summary has a field of that name"),
        (2, ["--copy-threshold", "0.5,x"], "is not a list of cosines"),
        (2, ["--dedup-within", "1"], "--dedup-within is for --dedup"),
        (2, ["--gallery", "a.jpg"], "does not end in .png"),
        (2, ["--memory", "lots"], "--memory lots is not a size"),
        (2, ["--extractor", "a", "--features", "b"], "two ways"),
        (2, ["--inception", "a", "--no-quality"], "which --no-quality leaves out"),
        (2, ["--space", "inception"], "--space inception needs --inception"),
        (66, ["--sscd", "no.pt"], "no file no.pt"),
        (66, ["--heldout", "no.safetensors"], "no file no.safetensors"),
    ],
)
def test_what_makes_no_sense_is_refused(code, arguments, message):
    assert message in refused(code, "--samples", HELDOUT, "--train", TRAIN, *arguments)


def test_too_few_samples_for_quality_are_refused(sets):
    message = refused(65, "--samples", f"{sets[0]}#:5", "--train", TRAIN)
    assert "--samples has 5 images, and quality with -k 5 needs more than 5" in message
    row = evaluate("--samples", f"{sets[0]}#:1", "--train", TRAIN, "--no-quality")
    assert (row["samples"], row["f_mem"]) == (1, 1)


def test_a_terminal_gets_a_table(sets, capsys, monkeypatch):
    from dlmctl.commands.memo_eval_samples import _table
    from dlmctl.memorization.images.compared_sets import compared_sets
    from dlmctl.memorization.images.sample_study import study_samples
    from dlmctl.settings.memorization import Bootstrap, SampleStudy

    monkeypatch.setenv("COLUMNS", "100")
    study = SampleStudy()
    compared = compared_sets(*map(read_images, (sets[0], TRAIN, HELDOUT)), study)
    result = study_samples(compared, study, Bootstrap(), torch.device("cpu"))
    _table(compared, result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["figure", "train", "heldout"]
    [line] = [line for line in lines if line.startswith("f_mem ")]
    assert line.split()[1] == f"{result.figures[0].values[0]:.4g}"
    assert "0 (0 – 0)" in line
    assert any(line.startswith("mmd2_gap_p") for line in lines)


def test_images_of_two_sizes_are_refused(tmp_path):
    other = save(tmp_path / "a.safetensors", torch.rand(9, 3, 8, 8))
    message = refused(65, "--samples", other, "--train", TRAIN)
    assert "--samples has images of 3 x 8 x 8, and --train of 1 x 8 x 8" in message
