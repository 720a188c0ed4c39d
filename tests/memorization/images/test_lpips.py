"""LPIPS against its formula written out, and against the package lpips."""

import orjson
import pytest
import torch
from conftest import invoke
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dlmctl.distill.image_sets import write_images
from dlmctl.memorization.images.lpips import Lpips
from dlmctl.memorization.images.weights_file import sha256
from dlmctl.records.errors import DataError, UsageError

CPU = torch.device("cpu")
ALEX = {0: (64, 11), 3: (192, 5), 6: (384, 3), 8: (256, 3), 10: (256, 3)}
VGG = {
    place: (width, 3)
    for width, places in (
        (64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)),
    )
    for place in places
}  # fmt: skip
"""Channels and size of the convolutions, by their place in torchvision's `features`."""
STRIDES = {"alex": {0: 4}, "vgg": {}}
POOLS = {"alex": {2: 3, 5: 3}, "vgg": {4: 2, 9: 2, 16: 2, 23: 2}}
"""Sizes of the maxima, all of stride 2, by their place."""
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
NAMES = {"alex": "AlexNet", "vgg": "VGG16"}


def published(net: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of a trunk, with a classifier, and of its heads, as they are published."""
    generator = torch.Generator().manual_seed(seed)
    trunk, heads, width = {}, {}, 3
    for place, (out, size) in (ALEX if net == "alex" else VGG).items():
        drawn = torch.randn(out, width, size, size, generator=generator)
        trunk[f"features.{place}.weight"] = drawn * (2 / (width * size**2)) ** 0.5
        trunk[f"features.{place}.bias"] = torch.randn(out, generator=generator) * 0.1
        if place + 1 in TAPS[net]:
            name = f"lin{TAPS[net].index(place + 1)}.model.1.weight"
            heads[name] = torch.rand(1, out, 1, 1, generator=generator)
        width = out
    trunk["classifier.6.weight"] = torch.ones(3, 3)
    return trunk, heads


def by_hand(net: str, state: dict[str, Tensor], heads: dict[str, Tensor], x: Tensor, y: Tensor):
    """The formula in float64, place by place; x and y are [N, 3, H, W] in [-1, 1]."""

    def maps(x: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found = (x.double() - shift.double().view(3, 1, 1)) / scale.double().view(3, 1, 1), []
        for place in range(max(TAPS[net]) + 1):
            weight = state.get(f"features.{place}.weight")
            if weight is not None:
                stride = STRIDES[net].get(place, 1)
                padding = 2 if weight.shape[-1] in (5, 11) else 1
                bias = state[f"features.{place}.bias"].double()
                x = functional.conv2d(x, weight.double(), bias, stride, padding)
            elif place in POOLS[net]:
                x = functional.max_pool2d(x, POOLS[net][place], 2)
            else:
                x = x.clamp(min=0)
            if place in TAPS[net]:
                found.append(x)
        return found

    total = torch.zeros(len(x), dtype=torch.float64)
    for number, (a, b) in enumerate(zip(maps(x), maps(y), strict=True)):
        head = heads[f"lin{number}.model.1.weight"].double().view(-1, 1, 1)
        a, b = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in (a, b))
        total += (head * (a - b).square()).sum(1).mean((1, 2))
    return total


def pictures(count: int, seed: int, height: int = 33, width: int = 40) -> Tensor:
    """Smooth images of whole levels, [N, 3, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 5, 5, generator=generator) * 60 + 128
    levels = functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 255).round()
    return levels / 127.5 - 1


@pytest.fixture(scope="module", params=["alex", "vgg"])
def weights(request, tmp_path_factory):
    """Name, both state dicts, and both files: one of torch.save, one of safetensors."""
    place, (trunk, heads) = tmp_path_factory.mktemp(request.param), published(request.param)
    files = place / "trunk.pth", place / "heads.safetensors"
    torch.save(trunk, files[0])
    save_file(heads, files[1])
    return request.param, trunk, heads, files


def test_distances_are_those_of_the_formula(weights):
    net, trunk, heads, files = weights
    x, y = pictures(3, 1), pictures(3, 2)
    measure = Lpips(*files, CPU)
    found, wanted = measure(x, y, batch_size=2), by_hand(net, trunk, heads, x, y)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert wanted.min() > 0.05
    assert measure(x, x).abs().max() == 0
    torch.testing.assert_close(measure(y, x), found)
    assert measure.about["lpips_network"] == NAMES[net]
    # Floats are rounded to bytes, and gray is three equal channels.
    gray = x[:, :1]
    torch.testing.assert_close(
        measure(gray + 0.003, y), by_hand(net, trunk, heads, gray.expand(-1, 3, -1, -1), y),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_distances_are_those_of_the_package_lpips(weights):
    """With the trunks of torchvision; the package ships heads, but here both are random."""
    net, trunk, heads, files = weights
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch
        pytest.skip(f"needs lpips and torchvision: {error}")
    own = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    slices = {
        name: name.replace("net.slice", "").split(".", 1)[1]
        for name in own.state_dict()
        if name.startswith("net.slice")
    }
    state = {name: trunk[f"features.{place}"] for name, place in slices.items()}
    missing, unexpected = own.load_state_dict({**state, **heads}, strict=False)
    assert not unexpected
    assert all(name.startswith(("lins.", "scaling_layer.")) for name in missing)
    x, y = pictures(3, 3, 64, 50), pictures(3, 4, 64, 50)
    with torch.no_grad():
        wanted = own(x, y).flatten().double()
    torch.testing.assert_close(Lpips(*files, CPU)(x, y), wanted, rtol=1e-5, atol=1e-6)
    assert wanted.min() > 0.05


def test_weights_of_other_networks_are_refused(tmp_path):
    trunk, heads = published("alex")
    other, other_heads = published("vgg")
    files = tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors"
    deeper = {**other, "features.30.weight": torch.ones(2)}
    cases = [
        ({"conv.weight": torch.ones(2)}, heads, "features.0.weight is not that of AlexNet"),
        ({k: v for k, v in trunk.items() if "10" not in k}, heads, "features.10.bias is missing"),
        (deeper, other_heads, "features.30.weight belongs to no part of torchvision's VGG16"),
        (trunk, other_heads, "lin1.model.1.weight has the shape"),
        (trunk, {k: v for k, v in heads.items() if "lin4" not in k}, "no weights of the heads"),
    ]
    for one, two, message in cases:
        for tensors, file in zip((one, two), files, strict=True):
            save_file(tensors, file)
        with pytest.raises(DataError, match=message):
            Lpips(*files, CPU)


def test_small_images_and_vectors_are_refused(weights):
    net, _, _, files = weights
    measure, least = Lpips(*files, CPU), {"alex": 31, "vgg": 16}[net]
    assert len(measure(*[pictures(2, 5, least, least)] * 2)) == 2
    with pytest.raises(UsageError, match=f"{NAMES[net]} takes images of at least {least} pixels"):
        measure(*[pictures(2, 5, least - 1, least)] * 2)
    with pytest.raises(UsageError, match="--lpips takes images of 1 or 3 channels"):
        measure(torch.zeros(2, 64), torch.zeros(2, 64))


def test_the_record_has_lpips_to_the_nearest_image_of_either_set(tmp_path):
    trunk, heads = published("alex")
    files = tmp_path / "alex.safetensors", tmp_path / "heads.safetensors"
    save_file(trunk, files[0])
    save_file(heads, files[1])
    train, heldout = pictures(4, 6), pictures(4, 7)
    samples = torch.cat([train[2:3], pictures(2, 8)])
    for name, images in (("s", samples), ("t", train), ("h", heldout)):
        write_images(tmp_path / f"{name}.safetensors", images)
    rows = tmp_path / "rows.jsonl"
    arguments = [
        "memo-eval", "--samples", tmp_path / "s.safetensors", "--train", tmp_path / "t.safetensors",
        "--heldout", tmp_path / "h.safetensors", "--no-quality", "--rows", rows,
    ]  # fmt: skip
    done = invoke(*arguments, "--lpips", files[0], "--lpips-heads", files[1])
    assert done.exit_code == 0, done.stderr
    row, lines = orjson.loads(done.stdout), rows.read_text().splitlines()
    measure = Lpips(*files, CPU)
    for prefix, images in (("", train), ("heldout_", heldout)):
        places = [orjson.loads(line)[f"{prefix}nn"] for line in lines]
        assert places == torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1).tolist()
        wanted = measure(samples, images[places])
        found = [orjson.loads(line)[f"{prefix}lpips"] for line in lines]
        assert found == pytest.approx(wanted.tolist(), abs=1e-6)
        assert row[f"{prefix}lpips"] == pytest.approx(float(wanted.mean()), abs=1e-6)
        assert row[f"{prefix}lpips_p05"] == pytest.approx(float(wanted.quantile(0.05)), abs=1e-6)
        assert len(row[f"{prefix}lpips_interval"]) == 2
    assert orjson.loads(lines[0])["lpips"] == 0
    assert row["lpips_weights_sha256"] == sha256(files[0])
    assert row["lpips_heads"] == str(files[1])
    alone = invoke(*arguments, "--lpips", files[0])
    assert (alone.exit_code, "give both" in alone.stderr) == (2, True)
