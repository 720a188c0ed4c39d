"""Directories of diffusers that are refused, each with a sentence that says what is wrong."""

import json
import shutil
import sys

import pytest
import torch
from conftest import invoke
from safetensors.torch import load_file, save_file

from dlmctl.distill.diffusers_directories import is_diffusers
from dlmctl.distill.image_checkpoints import load_model
from dlmctl.records.errors import DataError, MissingInputError, UnavailableError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    pytest.importorskip("diffusers")
    from tiny_pipelines import ddim, saved

    return saved(tmp_path_factory.mktemp("pipeline"), ddim())


@pytest.fixture
def pipeline(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pipe")


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "of a text"),
        ("model_index.json", {"image_encoder": ["a", "b"]}, "with the part image_encoder"),
        ("model_index.json", {"unet": ["pipeline_mine", "UNet2DModel"]}, "'pipeline_mine'"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "takes a text or another"),
        ("unet/config.json", {"_class_name": "DiTTransformer2DModel"}, "only the unconditional"),
        ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class-conditional"),
        ("unet/config.json", {"out_channels": 6}, "the variance is learned too"),
        ("unet/config.json", {"in_channels": 4}, "4 channels in and 3 out"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "fourier embedding of time"),
        ("unet/config.json", {"quantization_config": {}}, "quantized weights"),
        ("unet/config.json", {"sample_size": None}, "says no sample_size"),
        ("unet/config.json", {"sample_size": [8, "8"]}, "says no sample_size"),
        ("unet/config.json", {"block_out_channels": 3}, "cannot be loaded as a UNet2DModel"),
        ("unet/config.json", {"layers_per_block": 2}, "size mismatch for up_blocks"),
        ("unet/config.json", {"block_out_channels": [8, 8]}, "UNet2DModel"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchHeun"}, "FlowMatchHeun is n"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "dynamic thresholding"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "noise alone"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "not the configuration of a"),
        ("scheduler/scheduler_config.json", {"trained_betas": [-0.1] * 9}, "not of rising noise"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
            "a learned variance",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "only the discrete timesteps",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler", "sigma_min": 90},
            "not a range of positive numbers",
        ),
    ],
)
def test_what_is_not_handled_is_named(pipeline, file, changes, complaint):
    edit(pipeline / file, **changes)
    with pytest.raises(DataError) as raised:
        load_model(str(pipeline))
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(pipeline) in raised.value.where


def test_a_part_that_is_missing_is_named(pipeline):
    for part in ("scheduler", "unet"):
        shutil.move(pipeline / part, pipeline / "away")
        with pytest.raises(MissingInputError, match=f"has no part {part}"):
            load_model(str(pipeline))
        shutil.move(pipeline / "away", pipeline / part)
    (pipeline / WEIGHTS).rename(pipeline / "unet/diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(DataError, match="variant"):
        load_model(str(pipeline))


def test_pickles_are_not_read(pipeline):
    (pipeline / WEIGHTS).unlink()
    with pytest.raises(MissingInputError, match=r"no diffusion_pytorch_model.safetensors"):
        load_model(str(pipeline))
    torch.save({}, pipeline / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match=r"diffusion_pytorch_model.bin is pickled"):
        load_model(str(pipeline))


def test_weights_of_another_network_are_refused(pipeline):
    tensors = load_file(pipeline / WEIGHTS)
    name = next(iter(tensors))
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, "more": torch.zeros(1)},
        {**tensors, name: torch.zeros(3)},
    ):
        save_file(wrong, pipeline / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(DataError):
            load_model(str(pipeline))
    (pipeline / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(DataError):
        load_model(str(pipeline))


def test_a_unet_alone_takes_the_scheduler_beside_it(pipeline, tmp_path):
    whole = load_model(str(pipeline))
    x, sigma = torch.randn(1, 3, 8, 8), torch.tensor([0.7], dtype=torch.float64)
    inside = load_model(str(pipeline / "unet"))
    assert torch.equal(inside.function(x, sigma), whole.function(x, sigma))
    alone = shutil.copytree(pipeline / "unet", tmp_path / "alone")
    with pytest.raises(MissingInputError, match=r"put the scheduler_config.json"):
        load_model(str(alone))
    shutil.copy(pipeline / "scheduler/scheduler_config.json", alone)
    assert torch.equal(load_model(str(alone)).function(x, sigma), whole.function(x, sigma))
    (pipeline / "vae").mkdir()
    with pytest.raises(DataError, match="name the directory of the pipeline"):
        load_model(str(pipeline / "unet"))


def test_a_record_of_a_student_is_checked(pipeline):
    (pipeline / "model_index.json").unlink()
    with pytest.raises(MissingInputError, match=r"has no model_index.json, and no dlmctl.json"):
        load_model(str(pipeline))
    about = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    good = {"_class_name": "EDMEulerScheduler"}
    for record in (
        {},
        {"network": {"scheduler": about}, "kind": "consistency", "identity_at": None},
        {"network": {"scheduler": good}, "kind": "edm", "identity_at": None},
        {"network": {"scheduler": good}, "kind": "consistency", "identity_at": -1},
        {"network": {"scheduler": good}, "kind": "consistency", "identity_at": 0.1},
    ):
        (pipeline / "dlmctl.json").write_text(json.dumps(record))
        with pytest.raises(DataError, match="not the record of a student"):
            load_model(str(pipeline))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cd SET -o new --teacher PIPE --sigma-max 10", "from the last timestep on"),
        ("cd builtin:digits#0:4 -o new --teacher PIPE", "makes 3x8x8, and IMAGES are 1x8x8"),
        ("sample PIPE -o x --levels 80,1", "--levels is for students"),
        ("sample PIPE -o x --at 5", "there are: none"),
    ],
)
def test_options_that_do_not_fit_are_refused(pipeline, tmp_path, monkeypatch, line, complaint):
    from dlmctl.distill.image_sets import write_images

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "set.safetensors", torch.zeros(4, 3, 8, 8))
    line = line.replace("SET", "set.safetensors").replace("PIPE", str(pipeline))
    done = invoke("distill", *line.split(), "--device", "cpu")
    assert done.exit_code in (2, 66), done.stderr
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_without_diffusers_the_message_says_what_installs_it(tmp_path, monkeypatch):
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert is_diffusers(tmp_path)
    with pytest.raises(UnavailableError, match=r"pip install 'dlmctl\[diffusers\]'"):
        load_model(str(tmp_path))


def test_a_directory_of_another_library_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_diffusers(tmp_path)
    with pytest.raises(MissingInputError, match="or a pipeline of diffusers"):
        load_model(str(tmp_path))
