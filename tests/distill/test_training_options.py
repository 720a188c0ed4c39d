"""Options of training: dropout, flips, bfloat16, and images that stay bytes."""

import copy

import pytest
import torch
from conftest import invoke, read_jsonl
from safetensors.torch import load_file

from dlmctl.distill.image_checkpoints import ModelConfig, load_model
from dlmctl.distill.image_networks import NetworkConfig, RowDropout, draw_dropout, make_network
from dlmctl.distill.image_runs import student_run, teacher_run
from dlmctl.distill.image_sets import as_floats, write_images
from dlmctl.distill.image_training import flipped
from dlmctl.records.errors import UsageError
from dlmctl.settings.distill import Distillation
from dlmctl.settings.images import NoiseLaw, Training

UNET = NetworkConfig("unet", (3, 8, 8), 8, (1, 2), 1, (1,), 2)
MLP = NetworkConfig("mlp", (3, 8, 8), 8, (), 1)
BYTES = torch.randint(
    256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
OPTIONS = [
    {"dropout": 0.3},
    {"flip": True},
    {"dtype": "bfloat16"},
    {"dropout": 0.2, "flip": True, "dtype": "bfloat16"},
]


def recipe(**changes):
    settings = {"steps": 6, "batch_size": 4, "rate": 3e-3, "warmup": 0, "checkpoints": 2}
    return Training(**{**settings, "first": 3, **changes})


def begin(directory, images=BYTES, network=UNET, **changes):
    config = ModelConfig("edm", network)
    return teacher_run(directory, config, NoiseLaw(), images, recipe(**changes), {})


def train(run, records=None):
    taken = run.train(2, 0)
    for number, _ in enumerate(taken, start=1):
        if number == records:
            break
    return load_file(run.directory.path / "latest/model.safetensors") if records is None else None


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_on_bytes_is_that_on_floats_bit_for_bit(tmp_path):
    pixels = train(begin(tmp_path / "bytes"))
    assert same(pixels, train(begin(tmp_path / "floats", as_floats(BYTES))))
    run = begin(tmp_path / "held")
    assert run.images.dtype == torch.uint8
    assert run.images.data_ptr() == BYTES.data_ptr()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_with_options_resumes_bit_for_bit_and_another_is_refused(options, tmp_path):
    whole = train(begin(tmp_path / "whole", **options))
    for killed in (1, 2):
        train(begin(tmp_path / f"cut-{killed}", **options), killed)
        with pytest.raises(UsageError, match=f"another {next(iter(options))}"):
            begin(tmp_path / f"cut-{killed}")
        assert same(whole, train(begin(tmp_path / f"cut-{killed}", **options)))
    assert not same(whole, train(begin(tmp_path / "plain")))
    about = load_model(str(tmp_path / "whole")).training
    assert options.items() <= about.items()


def test_options_at_their_defaults_are_not_recorded_so_that_earlier_runs_resume(tmp_path):
    train(begin(tmp_path))
    about = load_model(str(tmp_path)).training
    assert not {"dropout", "flip", "dtype"} & about.keys()
    assert {"rate", "seed", "images_hash"} <= about.keys()


def test_what_does_not_fit_is_refused(tmp_path):
    for network, images, options, message in (
        (MLP, BYTES, {"dropout": 0.1}, "--dropout is for --network unet"),
        (NetworkConfig("mlp", (5,), 8, (), 1), torch.zeros(3, 5), {"flip": True}, "not vectors"),
    ):
        with pytest.raises(UsageError, match=message):
            begin(tmp_path / "run", images, network, **options)
    plan, config = Distillation("sct", init="scratch"), ModelConfig("consistency", UNET)
    with pytest.raises(UsageError, match="bfloat16 is too coarse for the derivative that sct"):
        student_run(tmp_path / "run", config, plan, None, BYTES, recipe(dtype="bfloat16"), {})
    assert not (tmp_path / "run").exists()


# --- dropout --------------------------------------------------------------------------------------


def masks(share, rows, first=0, step=0, layer=0):
    part = torch.nn.Sequential(*(RowDropout() for _ in range(layer + 1)))
    draw_dropout(part, share, 0, step, first)
    return part[layer](torch.ones(rows, 3, 15, 17))


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    for share in (0.1, 0.5, 0.99):
        found = masks(share, 200)
        assert found.unique().tolist() == pytest.approx([0, 1 / (1 - share)], rel=1e-3)
        assert (found == 0).double().mean().item() == pytest.approx(share, abs=0.005)
    # Rows, layers and steps have masks of their own.
    flat = torch.cat([masks(0.5, 2), masks(0.5, 1, layer=1), masks(0.5, 1, step=1)]).flatten(1)
    assert flat.corrcoef().fill_diagonal_(0).abs().max() < 0.15


def test_a_mask_is_that_of_the_row_whatever_rows_are_there():
    whole = masks(0.3, 7)
    assert torch.equal(torch.cat([masks(0.3, 2), masks(0.3, 5, first=2)]), whole)
    assert not torch.equal(masks(0.3, 2, first=1), whole[:2])


def test_dropout_is_in_every_block_of_the_u_net_in_training_alone():
    torch.manual_seed(0)
    network = make_network(UNET)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    x, c = torch.randn(2, 3, 8, 8), torch.zeros(2)
    plain = network(x, c)
    draw_dropout(network, 0.5, 0, 0, 0)
    dropped = network(x, c)
    assert (dropped - plain).abs().max() > 1e-2
    assert torch.equal(network(x, c), dropped)  # the same in each pass of a step
    assert torch.equal(network.eval()(x, c), plain)
    parts = [part for part in network.modules() if isinstance(part, RowDropout)]
    assert len(parts) == len({part.key for part in parts}) == 7


def test_the_target_of_ect_has_the_masks_of_the_student(tmp_path, monkeypatch):
    """Which is the network itself: both passes of a step drop the same activations."""
    seen = []
    forward = RowDropout.forward

    def watched(self, x):
        out = forward(self, x)
        if self.key[-1] == 0:
            seen.append((torch.is_grad_enabled(), (out == 0) & (x != 0)))
        return out

    monkeypatch.setattr(RowDropout, "forward", watched)
    plan, config = Distillation("ect", init="scratch"), ModelConfig("consistency", UNET)
    student_run(tmp_path, config, plan, None, BYTES, recipe(dropout=0.3), {})._take_step()
    assert [graded for graded, _ in seen] == [False, True]
    assert seen[0][1].any()
    assert torch.equal(seen[0][1], seen[1][1])


# --- flips, bfloat16 ------------------------------------------------------------------------------


def test_half_of_the_images_are_mirrored_left_to_right():
    images = torch.randn(400, 1, 3, 4)
    found = flipped(images, 1)
    mirrored = (found == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], images[~mirrored])
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(flipped(images, 1), found)
    assert not torch.equal(flipped(images, 2), found)


def test_flips_leave_the_noise_of_a_run_as_it_is(tmp_path):
    """So that of images which are their own mirrors nothing changes."""
    even = torch.cat([BYTES, BYTES.flip(-1)], -1)
    network = NetworkConfig("unet", (3, 8, 16), 8, (1, 2), 1)
    plain = train(begin(tmp_path / "plain", even, network))
    assert same(plain, train(begin(tmp_path / "flip", even, network, flip=True)))


def test_bfloat16_is_of_products_alone(tmp_path):
    run = begin(tmp_path, dtype="bfloat16")
    kinds = set()
    run.network.first.register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    exact, start = begin(tmp_path / "exact"), copy.deepcopy(run.network.state_dict())
    run._take_step()
    exact._take_step()
    assert kinds == {torch.bfloat16}
    for network in (run.network, run.averages["ema"][0]):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for state in run.optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    moments = [
        torch.cat([each.optimizer.state[p]["exp_avg"].flatten() for p in each.network.parameters()])
        for each in (run, exact)
    ]
    assert not torch.equal(*moments)
    assert torch.cosine_similarity(*moments, dim=0) > 0.99
    assert start.keys() == run.network.state_dict().keys()


# --- as typed -------------------------------------------------------------------------------------


def test_options_as_typed_and_a_student_of_other_images_is_told(tmp_path):
    from PIL import Image

    for place, side in (("photos", 20), ("others", 24)):
        for number in range(3):
            (tmp_path / place).mkdir(exist_ok=True)
            Image.effect_noise((side + number, side), 60).save(tmp_path / place / f"{number}.png")
    small = "--network unet --width 4 --blocks 1 --multipliers 1 --steps 2 -b 2 --checkpoints 1 -q"
    reading = "--resize 16 --crop 16 --gray"
    teacher = f"distill teacher {tmp_path}/photos {reading} {small} -o {tmp_path}/t --dropout 0.1"
    assert invoke(*teacher.split(), "--flip", "--dtype", "bfloat16").exit_code == 0
    about = load_model(str(tmp_path / "t")).training
    assert about["images"] == f"{tmp_path}/photos"
    assert (about["resize"], about["crop"], about["gray"]) == (16, 16, True)
    assert (about["dropout"], about["flip"], about["dtype"]) == (0.1, True, "bfloat16")
    refused = invoke(*teacher.replace("--resize 16", "--resize 17").split())
    assert refused.exit_code == 2
    assert "another resize" in refused.stderr

    student = f"distill cd {tmp_path}/%s --teacher {tmp_path}/t --steps 1 -b 2 -q -o {tmp_path}/%s"
    done = invoke(*(student % ("photos", "s1")).split(), *reading.split())
    assert (done.exit_code, done.stderr.count("was trained on")) == (0, 0)
    done = invoke(
        *(student % ("photos", "s2")).split(), *reading.replace("16 --c", "18 --c").split()
    )
    assert done.exit_code == 2
    assert "read the images of its student alike, not --resize 18 --crop 16 --gray" in done.stderr
    done = invoke(*(student % ("others", "s3")).split(), "--crop", "16", "--gray")
    assert done.exit_code == 0
    assert f"was trained on {tmp_path}/photos --resize 16 --crop 16 --gray, and" in done.stderr

    made = f"distill sample {tmp_path}/t -n 6 --steps 2 -o {tmp_path}/s.safetensors --json"
    done = invoke(*made.split())
    assert f'"trained_on":"{tmp_path}/photos --resize 16 --crop 16 --gray"' in done.stdout
    assert invoke(*made.split(), "--crop", "8").exit_code == 2
    judged = f"memo-eval --samples {tmp_path}/s.safetensors --no-quality --bootstrap 20"
    done = invoke(*judged.split(), "--train", f"{tmp_path}/photos", *reading.split())
    assert (done.exit_code, done.stderr.count("other images")) == (0, 0)
    done = invoke(*judged.split(), "--train", f"{tmp_path}/photos", "--crop", "16", "--gray")
    assert done.exit_code == 0
    assert "photos --resize 16 --crop 16 --gray, and --train has other images" in done.stderr


def test_the_exact_denoiser_reads_images_by_the_same_options(tmp_path):
    from PIL import Image

    for number in range(3):
        Image.effect_noise((9, 8 + number), 60).save(tmp_path / f"{number}.png")
    line = f"distill sample optimal:{tmp_path} -n 4 --crop 8 --gray -o {tmp_path}/s.safetensors"
    assert invoke(*line.split(), "--json").exit_code == 0
    line = f"memo-eval --samples {tmp_path}/s.safetensors --train {tmp_path} --crop 8 --gray"
    done = invoke(*line.split(), *f"--no-quality --bootstrap 20 -o {tmp_path}/rows".split())
    assert done.exit_code == 0, done.stderr
    assert read_jsonl(tmp_path / "rows")[0]["f_mem"] == 1


def test_vectors_are_not_mirrored(tmp_path):
    write_images(tmp_path / "v.safetensors", torch.randn(4, 5).clamp(-1, 1))
    line = f"distill teacher {tmp_path}/v.safetensors --flip --steps 1 -b 2 -o {tmp_path}/run"
    done = invoke(*line.split())
    assert done.exit_code == 2
    assert "--flip is for images" in done.stderr
