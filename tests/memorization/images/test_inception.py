"""FID and KID: torch-fidelity's network with a user's weights, and what is made of features."""

import io
import math
import sys

import numpy
import orjson
import pytest
import torch
from conftest import invoke
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dlmctl.distill.image_sets import read_images, write_images
from dlmctl.memorization.images.compared_sets import compared_sets, with_features
from dlmctl.memorization.images.kernel_distance import kernel_distance
from dlmctl.memorization.images.quality import fit_gaussian, frechet_distance
from dlmctl.memorization.images.sample_quality import quality
from dlmctl.memorization.images.weights_file import sha256
from dlmctl.records.errors import DataError
from dlmctl.settings.memorization import Bootstrap, SampleStudy

CPU = torch.device("cpu")


def pictures(count: int, seed: int) -> Tensor:
    """Smooth images of whole levels, uint8 [N, 3, 20, 20]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 5, 5, generator=generator) * 50 + 128
    return functional.interpolate(small, (20, 20), mode="bicubic").clamp(0, 255).byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights by the names of the published file, with activations of about unit size."""
    pytest.importorskip("torchvision")
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Random(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    for part in network.train().modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        network(pictures(4, 9))
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.eval().state_dict(), file)
    return file


def test_features_are_those_of_torch_fidelity(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from dlmctl.memorization.images.inception import InceptionEncoder

    own = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    images = pictures(3, 1)
    found = InceptionEncoder(weights, "tensorflow", CPU)(images / 127.5 - 1, batch_size=2)
    torch.testing.assert_close(found, own(images)[0], rtol=1e-5, atol=1e-5)
    # Gray is three equal channels, and floats are rounded to bytes.
    gray = pictures(2, 2)[:, :1]
    found = InceptionEncoder(weights, "tensorflow", CPU)((gray + 0.3) / 127.5 - 1)
    wanted = own(gray.expand(-1, 3, -1, -1))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("edge", [32, 400])
def test_clean_pixels_are_pillows_in_floats(weights, edge):
    """As clean-fid resizes: each channel as an image of floats, bicubic, then clamped."""
    from dlmctl.memorization.images.inception import InceptionEncoder

    images = functional.interpolate(pictures(2, 3).float(), (edge, edge + 8)).byte()
    encoder = InceptionEncoder(weights, "clean", CPU)
    found = encoder._resized(images.float())
    for image, other in zip(images, found, strict=True):
        for channel, pixels in zip(image, other, strict=True):
            plain = Image.fromarray(channel.numpy().astype(numpy.float32))
            wanted = numpy.asarray(plain.resize((299, 299), Image.Resampling.BICUBIC))
            assert numpy.abs(wanted.clip(0, 255) - pixels.numpy()).max() < 1e-4


def test_the_record_names_the_weights(weights, tmp_path):
    for name, count, seed in (("s", 8, 4), ("t", 9, 5)):
        write_images(tmp_path / f"{name}.safetensors", pictures(count, seed) / 127.5 - 1)
    done = invoke(
        "memo-eval", "--samples", tmp_path / "s.safetensors", "--train", tmp_path / "t.safetensors",
        "--inception", weights, "--bootstrap", 20,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    row = orjson.loads(done.stdout)
    assert (row["inception"], row["inception_sha256"]) == (str(weights), sha256(weights))
    assert (row["inception_resize"], row["space"], row["kid_subset"]) == (
        "tensorflow", "inception", 8,
    )  # fmt: skip
    assert row["fid"] > 0
    assert "fd" not in row
    assert "is not the published file" in done.stderr
    assert "the smallest set has 8 images" in done.stderr


def test_other_weights_are_refused(weights, tmp_path):
    from dlmctl.memorization.images.inception import InceptionEncoder

    file = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.ones(2)}, file)
    with pytest.raises(DataError, match="no weights of FID's Inception network"):
        InceptionEncoder(file, "tensorflow", CPU)


def test_without_torch_fidelity_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    for name in ("", ".feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, f"torch_fidelity{name}", None)
    file = tmp_path / "w.pth"
    torch.save({"a": torch.ones(2)}, file)
    digits = "builtin:digits#0:20"
    done = invoke("memo-eval", "--samples", digits, "--train", digits, "--inception", file)
    assert done.exit_code == 69
    assert "pip install 'dlmctl[fid]'" in done.stderr


@pytest.fixture(scope="module")
def sets():
    """Digits, with random projections in the place of Inception's features."""
    parts = [read_images(f"builtin:digits#{a}:{a + 60}") for a in (0, 60, 120)]
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(64, 12, generator=generator)
    return with_features(
        compared_sets(*parts, SampleStudy()), "inception", lambda _, part: part.vectors(CPU) @ axes
    )


def test_fid_and_kid_are_of_inceptions_features(sets):
    study = SampleStudy(kid_subsets=7, kid_subset_size=50)
    figures, joint = quality(sets, study, Bootstrap(20, seed=3), CPU)
    found = {figure.name: figure.values for figure in figures}
    x, y, z = (
        part.features["inception"].double() for part in (sets.samples, sets.train, sets.unseen)
    )
    for place, other in enumerate((y, z)):
        kid = kernel_distance(x, other, 7, 50, seed=3)
        assert (found["kid"][place], found["kid_std"][place]) == kid
        gaussians = fit_gaussian(x, "x"), fit_gaussian(other, "y")
        assert found["fid"][place] == pytest.approx(frechet_distance(*gaussians))
    assert joint["fid_train_heldout"] == pytest.approx(
        frechet_distance(fit_gaussian(y, "y"), fit_gaussian(z, "z"))
    )
    assert (joint["space"], joint["kid_subset"]) == ("inception", 50)
    # What tells good samples comes first, and the distances last.
    names = list(found)
    assert names[:5] == ["precision", "recall", "density", "coverage", "mmd2"]
    assert names[-1] == "fid"


def test_another_space_has_its_own_distance(sets):
    names = [f.name for f in quality(sets, SampleStudy(space="pca:4"), Bootstrap(20), CPU)[0]]
    assert names[-3:] == ["kid_std", "fid", "fd"]
    # Fewer images than features are no reason to refuse FID, as they are for other distances.
    wide = with_features(sets, "inception", lambda _, part: part.vectors(CPU).tile(2))
    figures, _ = quality(wide, SampleStudy(), Bootstrap(20), CPU)
    assert all(math.isfinite(value) for figure in figures for value in figure.values)
