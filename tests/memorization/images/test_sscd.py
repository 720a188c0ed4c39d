"""SSCD against a ResNet-50 written out, in the names of the published weights."""

import numpy
import orjson
import pytest
import torch
from conftest import invoke
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dlmctl.distill.image_sets import write_images
from dlmctl.memorization.images.sscd import MEAN, STD, SscdEncoder, resized
from dlmctl.memorization.images.weights_file import sha256
from dlmctl.records.errors import DataError

CPU = torch.device("cpu")
BLOCKS = (3, 4, 6, 3)


def published_state(seed: int, dims: int = 24) -> dict[str, Tensor]:
    """Random weights by the names that torchvision's resnet50 has in SSCD's files."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(name: str, norm: str, into: int, out: int, size: int) -> None:
        scale = (2 / (into * size**2)) ** 0.5
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) * scale
        for each in ("weight", "bias", "running_mean", "running_var"):
            drawn = torch.rand(out, generator=generator)
            state[f"{norm}.{each}"] = (
                drawn + 0.5 if each.endswith(("weight", "var")) else drawn - 0.5
            )
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    convolution("backbone.conv1", "backbone.bn1", 3, 64, 7)
    width = 64
    for stage, count in enumerate(BLOCKS):
        inner = 64 * 2**stage
        for number in range(count):
            block = f"backbone.layer{stage + 1}.{number}"
            sizes = ((width, inner, 1), (inner, inner, 3), (inner, 4 * inner, 1))
            for place, (into, out, size) in enumerate(sizes, 1):
                convolution(f"{block}.conv{place}", f"{block}.bn{place}", into, out, size)
            if not number:
                name = f"{block}.downsample"
                convolution(f"{name}.0", f"{name}.1", width, 4 * inner, 1)
            width = 4 * inner
    state["backbone.fc.weight"] = torch.randn(dims, width, generator=generator)
    state["backbone.fc.bias"] = torch.randn(dims, generator=generator)
    return state


def descriptors(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What model.py of SSCD says, in float64 and in so many words."""
    state = {name.removeprefix("backbone."): tensor.double() for name, tensor in state.items()}

    def step(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, gain, bias = (
            state[f"{norm}.{each}"].view(-1, 1, 1)
            for each in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = functional.max_pool2d(step(x.double(), "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage, count in enumerate(BLOCKS):
        for number in range(count):
            block, stride = f"layer{stage + 1}.{number}", 2 if stage and not number else 1
            y = step(x, f"{block}.conv1", f"{block}.bn1").relu()
            y = step(y, f"{block}.conv2", f"{block}.bn2", stride).relu()
            y = step(y, f"{block}.conv3", f"{block}.bn3")
            if not number:
                x = step(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = (x + y).relu()
    pooled = x.flatten(2).clamp(min=1e-6).pow(3).mean(2).pow(1 / 3)
    out = pooled @ state["fc.weight"].T + state["fc.bias"]
    return out / out.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    state = published_state(0)
    file = tmp_path_factory.mktemp("sscd") / "sscd.torchvision.pt"
    torch.save(state, file)
    return state, file


def pictures(count: int, seed: int, height: int = 24, width: int = 24) -> Tensor:
    """Smooth images of whole levels, [N, 3, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator) * 60 + 128
    levels = functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 255).round()
    return levels / 127.5 - 1


def test_descriptors_are_those_of_the_network_written_out(published):
    state, file = published
    images = pictures(3, 1)
    found = SscdEncoder(file, CPU)(images, batch_size=2)
    levels = ((images + 1) * 127.5).round().byte()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    wanted = descriptors(state, (resized(levels) / 255 - mean) / std)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)
    # Other weights give others.
    assert (descriptors(published_state(1), resized(levels) / 255) - wanted).abs().max() > 0.05


@pytest.mark.parametrize(("height", "width"), [(24, 24), (30, 50), (400, 300)])
def test_images_are_resized_as_pillow_does(height, width):
    levels = ((pictures(1, 2, height, width) + 1) * 127.5).round().byte()
    found = resized(levels)
    short = min(height, width)
    size = 288 * height // short, 288 * width // short
    assert found.shape == (1, 3, *size)
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    pillow = numpy.array(image.resize(size[::-1], Image.Resampling.BILINEAR))
    wanted = torch.from_numpy(pillow).permute(2, 0, 1)
    assert (found[0] - wanted).abs().max() <= 1  # Pillow rounds after each direction


def test_weights_of_other_networks_are_refused(tmp_path, published):
    state, _ = published
    file = tmp_path / "other.safetensors"
    cases = [
        ({"layer.weight": torch.ones(2, 2)}, "no weights of SSCD in the names of torchvision"),
        ({name: state[name] for name in state if "layer4.2" not in name}, "is missing"),
        ({**state, "backbone.head.weight": torch.ones(2)}, "belongs to no part of SSCD"),
    ]
    for tensors, message in cases:
        save_file(tensors, file)
        with pytest.raises(DataError, match=message):
            SscdEncoder(file, CPU)


def test_copies_are_those_of_somepalli(tmp_path, published):
    """Mean and 95th percentile of the largest cosine, and the share of more than 0.5."""
    file = published[1]
    train = pictures(4, 3)
    samples = torch.cat([train[:2], pictures(2, 4)])
    for name, images in (("s", samples), ("t", train)):
        write_images(tmp_path / f"{name}.safetensors", images)
    rows = tmp_path / "rows.jsonl"
    done = invoke(
        "memo-eval", "--samples", tmp_path / "s.safetensors", "--train", tmp_path / "t.safetensors",
        "--sscd", file, "--no-quality", "--rows", rows, "--copy-threshold", "0.5,0.9999",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    row = orjson.loads(done.stdout)
    encode = SscdEncoder(file, CPU)
    largest = (encode(samples) @ encode(train).T).amax(1).double()
    assert row["sim"] == pytest.approx(float(largest.mean()), abs=1e-6)
    assert row["sim_p95"] == pytest.approx(float(largest.quantile(0.95)), abs=1e-6)
    assert row["sim_over_0.5"] == float((largest > 0.5).double().mean())
    assert row["sim_over_0.9999"] == 0.5
    assert (row["sscd"], row["sscd_sha256"]) == (str(file), sha256(file))
    sims = [orjson.loads(line)["sim"] for line in rows.read_text().splitlines()]
    assert sims == pytest.approx(largest.tolist(), abs=1e-6)


def test_torchvision_gives_the_same_descriptors(published):
    models = pytest.importorskip("torchvision.models.resnet")
    state, file = published
    network = models.resnet50(num_classes=24)

    class Pool(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).clamp(min=1e-6).pow(3).mean(2).pow(1 / 3)

    network.avgpool = Pool()
    network.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    images = pictures(2, 5)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        pixels = (resized(((images + 1) * 127.5).round().byte()) / 255 - mean) / std
        wanted = functional.normalize(network.eval()(pixels))
    torch.testing.assert_close(SscdEncoder(file, CPU)(images), wanted, rtol=0, atol=1e-6)
