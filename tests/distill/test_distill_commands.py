"""`dlmctl distill`: teacher, student and samples as they are typed."""

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl
from safetensors import safe_open

from dlmctl.distill.image_checkpoints import load_model
from dlmctl.distill.image_sampling import draw, levels, sample_noise
from dlmctl.distill.image_sets import read_images, write_images

TINY = "--network mlp --width 16 --blocks 1 --steps 6 -b 8 --log-every 3 --first-checkpoint 2"
TINY += " --checkpoints 3 --device cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of images, a teacher and a student of it."""
    root = tmp_path_factory.mktemp("distill")
    random = torch.Generator().manual_seed(0)
    write_images(root / "set.safetensors", torch.rand(20, 1, 4, 4, generator=random) * 2 - 1)
    teacher = run("teacher", root / "set.safetensors", "-o", root / "teacher", *TINY.split())
    assert [record["step"] for record in teacher] == [3, 6]
    assert {"loss", "lr", "grad_norm", "seconds"} <= teacher[0].keys()
    line = f"{root}/set.safetensors --teacher {root}/teacher -o {root}/student --steps 6 -b 8"
    student = run("cd", *f"{line} --scales 5 --log-every 3 --device cpu".split())
    assert read_jsonl(root / "student" / "metrics.jsonl") == student
    return root


def run(*arguments):
    done = invoke("distill", *arguments)
    assert done.exit_code == 0, done.stderr
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def sampled(folder, model, *options):
    out = folder / "samples" / "out.safetensors"
    [row] = run("sample", folder / model, "-o", out, "--json", "--device", "cpu", *options)
    return read_images(str(out)), row


def test_checkpoints_are_models_with_their_story(folder):
    found = load_model(str(folder / "teacher"), at=3)
    assert found.training["step"] == 3
    assert found.training["images"].endswith("set.safetensors")
    student = load_model(str(folder / "student"))
    assert student.kind == "consistency"
    assert student.training["teacher_revision"] == load_model(str(folder / "teacher")).revision
    assert student.training["teacher"] == f"{folder}/teacher/step-000006"
    assert student.config.network == found.config.network


@pytest.mark.parametrize("steps", [8, 21, 40])
def test_ect_goes_through_all_its_stages_whatever_the_steps(folder, tmp_path, steps, monkeypatch):
    from dlmctl.distill import consistency_model as consistency

    stages, level = [], consistency.ect_level

    def watched(sigma, stage):
        stages.append(stage)
        return level(sigma, stage)

    monkeypatch.setattr(consistency, "ect_level", watched)
    line = f"{folder}/set.safetensors --objective ect --init scratch -o {tmp_path}/ect {TINY}"
    line = line.replace("--steps 6", f"--steps {steps}")
    run("cd", *line.split())
    assert stages == sorted(stages)
    assert len(stages) == steps
    assert set(stages) == set(range(8))  # each for as long as any other
    assert max(map(stages.count, range(8))) - min(map(stages.count, range(8))) <= 1
    near = torch.tensor([1e-3], dtype=torch.float64)
    assert float(level(near, stages[-1]) / near) > 0.98
    run("cd", *line.replace("/ect ", "/own ").split(), "--stage-steps", 2)
    assert stages[steps:] == [n // 2 for n in range(steps)]


def test_samples_do_not_depend_on_how_many_or_the_batch(folder):
    for model, steps in (("teacher", "3"), ("student", "1"), ("student", "3")):
        many, row = sampled(folder, model, "-n", "9", "--steps", steps, "-b", "4")
        few, _ = sampled(folder, model, "-n", "5", "--steps", steps)
        assert row["count"] == len(many) == 9
        torch.testing.assert_close(many[:5], few, rtol=1e-4, atol=1e-4)
        other, _ = sampled(folder, model, "-n", "5", "--steps", steps, "--seed", "1")
        assert (other - few).abs().max() > 0.01


def test_teacher_and_student_begin_at_the_same_noise(folder, monkeypatch):
    """What the first evaluation of either sees."""
    begun = {}
    for name in ("teacher", "student"):
        model = load_model(str(folder / name))
        original = model.function.forward

        def seen(x, sigma, name=name, original=original):
            begun.setdefault(name, (x, sigma))
            return original(x, sigma)

        monkeypatch.setattr(model.function, "forward", seen)
        draw(model, 6, 3, levels(model, 4))
    assert torch.equal(begun["teacher"][0], begun["student"][0])
    assert torch.equal(begun["teacher"][1], begun["student"][1])
    expected = 80 * sample_noise(3, range(6), (1, 4, 4))
    torch.testing.assert_close(begun["student"][0], expected)


def test_the_record_counts_evaluations(folder):
    for model, options, count in (
        ("teacher", [], 35),
        ("teacher", ["--steps", "5", "--solver", "euler"], 5),
        ("student", [], 1),
        ("student", ["--steps", "4"], 4),
    ):
        _, row = sampled(folder, model, "-n", "2", *options)
        assert row["evaluations"] == count
        assert row["step"] == 6
    with safe_open(row["samples"], "pt") as file:
        assert file.metadata()["kind"] == "consistency"


def test_levels_of_a_student_are_those_that_are_given(folder):
    found, row = sampled(folder, "student", "-n", "3", "--levels", "20,0.5", "--seed", "4")
    assert (row["levels"], row["steps"], row["evaluations"]) == ([20, 0.5], 2, 2)
    model = load_model(str(folder / "student"))
    first, second = (sample_noise(4, range(3), (1, 4, 4), step) for step in (0, 1))
    level = torch.tensor([20.0, 0.5], dtype=torch.float64)
    once = model.function(20 * first, level[:1].expand(3))
    again = once + (0.5**2 - 0.002**2) ** 0.5 * second
    torch.testing.assert_close(found, model.function(again, level[1:].expand(3)))
    usual, _ = sampled(folder, "student", "-n", "3", "--steps", "2", "--seed", "4")
    assert (usual - found).abs().max() > 0.01


def test_a_student_of_less_noise_begins_there(folder, tmp_path):
    line = f"{folder}/set.safetensors --teacher {folder}/teacher -o {tmp_path}/less --sigma-max 10"
    run("cd", *f"{line} --weight cout --steps 3 -b 8 --device cpu".split())
    model = load_model(str(tmp_path / "less"))
    assert model.noise.sigma_max == levels(model, 1).item() == 10
    assert levels(model, 2)[0] == 10
    assert model.training["weight"] == "cout"


def test_a_student_in_continuous_time_is_its_teacher_at_first(folder, tmp_path):
    line = f"{folder}/set.safetensors --teacher {folder}/teacher -o {tmp_path}/scd --objective scd"
    line += " --checkpoints 2 --first-checkpoint 1 -b 8 --device cpu --lr 0 --steps 2"
    run("cd", *line.split(), "--tangent-warmup", "1")
    model, teacher = (load_model(str(path)) for path in (tmp_path / "scd", folder / "teacher"))
    assert model.config.identity_at == 0
    assert model.training["tangent_warmup"] == 1
    x, sigma = torch.randn(4, 1, 4, 4), torch.tensor([0.01, 0.1, 1.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(model.function(x, sigma), teacher.function(x, sigma))


def test_a_checkpoint_is_chosen_by_its_step(folder):
    early, row = sampled(folder, "teacher", "-n", "3", "--at", "2")
    late, _ = sampled(folder, "teacher", "-n", "3")
    assert row["step"] == 2
    assert not torch.equal(early, late)


def test_several_checkpoints_give_a_file_each(folder, tmp_path):
    line = f"sample {folder}/teacher -n 3 --device cpu -o {tmp_path}/s-{{step}}.safetensors --at"
    rows = run(*line.split(), "all")
    assert [row["step"] for row in rows] == [2, 3, 6]
    for row in rows:
        assert row["samples"] == f"{tmp_path}/s-{row['step']}.safetensors"
        alone, _ = sampled(folder, "teacher", "-n", "3", "--at", str(row["step"]))
        assert torch.equal(read_images(row["samples"]), alone)
    assert [row["step"] for row in run(*line.split(), "2,6")] == [2, 6]
    done = invoke("distill", "sample", f"{folder}/teacher", "--at", "2,6", "-o", tmp_path / "s")
    assert done.exit_code == 2
    assert "{step}" in done.stderr


def test_the_exact_denoiser_is_a_model_and_a_teacher(folder, tmp_path):
    name = f"optimal:{folder}/set.safetensors"
    out = tmp_path / "o.safetensors"
    [row] = run("sample", name, "-n", "10", "-o", out, "--json", "--device", "cpu")
    data = read_images(f"{folder}/set.safetensors")
    assert torch.cdist(read_images(str(out)).flatten(1), data.flatten(1)).min(1).values.max() < 0.01
    assert row["kind"] == "optimal"
    line = f"{folder}/set.safetensors --teacher {name} --init scratch -o {tmp_path}/s {TINY}"
    run("cd", *line.split())
    assert load_model(str(tmp_path / "s")).config.network.width == 16


@pytest.mark.parametrize("objective", ["ct", "ect", "sct"])
def test_students_without_a_teacher(folder, tmp_path, objective):
    line = f"{folder}/set.safetensors --objective {objective} --init scratch -o {tmp_path} {TINY}"
    assert len(run("cd", *line.split())) == 2
    assert "teacher" not in load_model(str(tmp_path)).training


def test_the_same_command_goes_on_or_says_that_all_is_done(folder):
    done = invoke(
        "distill", "teacher", folder / "set.safetensors", "-o", folder / "teacher", *TINY.split()
    )
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "trained already" in done.stderr


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        ("teacher SET -o new --sigma-min 90", 2, "--sigma-min 90 and --sigma-max 80"),
        ("teacher SET -o new --sigma-data 0", 2, "--sigma-data is above 0"),
        ("teacher SET -o new --network mlp --multipliers 1,2", 2, "for --network unet"),
        ("teacher SET -o new --network unet --multipliers 1,1,1,1", 2, "cannot be halved 3 times"),
        ("teacher nothing.safetensors -o new", 66, "nothing.safetensors"),
        ("teacher SET -o teacher --steps 6 --lr 1", 2, "another"),
        ("cd SET -o new", 2, "--objective cd needs --teacher"),
        ("cd SET -o new --objective ct", 2, "--init teacher needs --teacher"),
        ("cd SET -o new --objective ect --scales 5 --init scratch", 2, "--scales is not for"),
        ("cd SET -o new --objective ct --solver heun --init scratch", 2, "--solver is not for"),
        ("cd SET -o new --teacher teacher --stage-steps 5", 2, "--stage-steps is not for"),
        ("cd SET -o new --teacher student", 2, "is a student itself"),
        ("cd SET -o new --teacher teacher --width 32", 2, "the teacher's network"),
        ("cd SET -o new --teacher optimal:SET", 2, "--init scratch"),
        ("cd builtin:digits#0:5 -o new --teacher teacher", 2, "1x4x4, and IMAGES are 1x8x8"),
        ("cd SET -o new --teacher nowhere", 66, "has no model"),
        ("sample student -o x --solver heun", 2, "--solver is for denoisers"),
        ("sample teacher -o x --at 5", 66, "there are: 2, 3, 6"),
        ("sample optimal:SET -o x --at 5", 2, "no checkpoints"),
        ("sample student -n 1 --device cpu -o teacher", 73, "cannot write teacher"),
        ("sample student -n 1 --device cpu -o /proc/x/y", 73, "cannot write /proc/x/y"),
        ("cd SET -o new --teacher teacher --sigma-max 90", 2, "more noise than the 80"),
        ("cd SET -o new --teacher teacher --sigma-max 0.001", 2, "not a range of positive numbers"),
        ("cd SET -o new --objective scd", 2, "--objective scd needs --teacher"),
        ("cd SET -o new --objective sct --loss l2 --init scratch", 2, "--loss is not for"),
        ("cd SET -o new --teacher teacher --tangent-warmup 5", 2, "--tangent-warmup is not for"),
        ("cd SET -o new --init scratch --objective ect --weight cout", 2, "--weight is not for"),
        ("sample student -o x --levels 80,0.5 --steps 2", 2, "leave --steps out"),
        ("sample student -o x --levels 0.5,80", 2, "0.5,80 do not fall from at most 80"),
        ("sample student -o x --levels 81,1", 2, "81,1 do not fall from at most 80"),
        ("sample student -o x --levels 80,0.002", 2, "to more than 0.002"),
        ("sample teacher -o x --levels 80,1", 2, "--levels is for students"),
        ("sample nowhere -o x", 66, "has no model"),
    ],
)
def test_what_does_not_make_sense_is_refused(folder, monkeypatch, line, code, complaint):
    monkeypatch.chdir(folder)
    done = invoke("distill", *line.replace("SET", "set.safetensors").split())
    assert done.exit_code == code, done.stderr
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "new").exists()
