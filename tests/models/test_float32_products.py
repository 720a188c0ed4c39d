"""Products that decide something have all bits, whatever TF32 is allowed to do elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, backends
from transformers import Dinov2Config, Dinov2Model

from dlmctl.memorization.images.image_encoder import ImageEncoder
from dlmctl.memorization.images.neighbours import nearest, product_error
from dlmctl.models.float32_products import whole_products
from dlmctl.sae.evaluation.single import direction_method
from dlmctl.sae.evaluation.stability import match_decoders
from dlmctl.sae.topk import TopKSae

if not hasattr(backends.cuda.matmul, "fp32_precision"):
    pytest.skip("this torch has the older switches alone", allow_module_level=True)


def settings() -> dict[str, Any]:
    """Every switch, older and newer; an older one that cannot be read is an error."""
    reads = {
        "products": torch.get_float32_matmul_precision,
        "allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "matmul": lambda: backends.cuda.matmul.fp32_precision,
        "cpu": lambda: backends.mkldnn.matmul.fp32_precision,
        "cudnn": lambda: backends.cudnn.allow_tf32,
        "conv": lambda: backends.cudnn.conv.fp32_precision,
        "rnn": lambda: backends.cudnn.rnn.fp32_precision,
        "all": lambda: backends.fp32_precision,
    }
    values = {}
    for name, read in reads.items():
        try:
            values[name] = read()
        except RuntimeError:
            values[name] = "contradicted"
    return values


def older() -> None:
    """As NVIDIA's containers begin."""
    torch.set_float32_matmul_precision("high")


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def newer() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"


def everywhere() -> None:
    backends.fp32_precision = "tf32"


def in_convolutions() -> None:
    backends.cudnn.fp32_precision = "tf32"


WAYS = [older, medium, newer, everywhere, in_convolutions]


def reset() -> None:
    """As torch begins; what was compiled before a test may have set switches."""
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    reset()
    yield
    reset()


@pytest.mark.parametrize("allow", WAYS)
def test_tf32_is_off_within_the_block_and_afterwards_all_is_as_before(allow: Any) -> None:
    allow()
    before = settings()
    assert "tf32" in before.values()
    with whole_products():
        within = settings()
        assert within["products"] == "highest"
        for name in ("matmul", "cpu", "conv", "rnn"):
            assert within[name] in ("ieee", "none"), name
    assert settings() == before
    with pytest.raises(ZeroDivisionError), whole_products(), whole_products():
        1 / 0  # noqa: B018
    assert settings() == before


def tf32(values: Tensor) -> Tensor:
    """Rounded to 11 bits, 10 of them stored, to the nearest and half to even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose operands are rounded if that is allowed."""
    addmm, matmul = torch.addmm, Tensor.__matmul__

    def operands(*factors: Tensor) -> list[Tensor]:
        rounds = backends.cuda.matmul.fp32_precision == "tf32"
        return [tf32(x) if rounds and x.dtype == torch.float32 else x for x in factors]

    monkeypatch.setattr(torch, "addmm", lambda a, *xy, **more: addmm(a, *operands(*xy), **more))
    monkeypatch.setattr(Tensor, "__matmul__", lambda x, y: matmul(*operands(x, y)))


def test_what_is_emulated_is_tf32(tensor_cores: None) -> None:
    assert product_error(torch.device("cpu"), torch.float32) < 1e-7
    older()
    assert product_error(torch.device("cpu"), torch.float32) == pytest.approx(2**-10, rel=0.2)
    with whole_products():
        assert product_error(torch.device("cpu"), torch.float32) < 1e-7


def plain_codes(sae: TopKSae, x: Tensor) -> Tensor:
    """The latents of each activation without the switch, ascending."""
    pre = torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc)
    return pre.topk(sae.k, dim=1).indices.sort(dim=1).values


@pytest.mark.parametrize("allow", [older, newer, everywhere])
def test_latents_are_those_of_whole_products(tensor_cores: None, allow: Any) -> None:
    torch.manual_seed(0)
    sae = TopKSae(64, 4096, 64).requires_grad_(False)
    sae.W_enc.normal_()
    x = torch.randn(500, 64)
    expected = plain_codes(sae, x)
    allow()
    coarse = plain_codes(sae, x)
    assert 5 < int((coarse != expected).any(dim=1).sum()) < 250
    assert torch.equal(sae.encode(x).indices.sort(dim=1).values, expected)


def test_counterparts_of_a_decoder_are_those_of_whole_products(tensor_cores: None) -> None:
    torch.manual_seed(0)
    row = torch.nn.functional.normalize(torch.randn(1, 64), dim=1)
    newer()
    assert abs(match_decoders(row, row)["matched"] - 1) < 1e-6
    assert abs(float(row @ row.T) - 1) > 1e-5


@pytest.mark.parametrize("allow", [older, newer, everywhere])
def test_neighbours_need_no_second_search(
    tensor_cores: None, monkeypatch: pytest.MonkeyPatch, allow: Any
) -> None:
    """In float64, which the error of coarser products would force."""
    from dlmctl.memorization.images import neighbours

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 64, generator=generator) for n in (50, 300))
    wanted = torch.cdist(x.double(), y.double()).argsort(dim=1, stable=True)[:, :2]
    searched, run = [], neighbours._Search.run

    def watched(search: Any, part: Tensor, rows: Tensor, dtype: torch.dtype) -> Any:
        searched.append((dtype, backends.cuda.matmul.fp32_precision))
        return run(search, part, rows, dtype)

    monkeypatch.setattr(neighbours._Search, "run", watched)
    allow()
    assert torch.equal(nearest(x, y, 2).indices, wanted)
    assert searched == [(torch.float32, "ieee")]


def test_products_with_directions_are_whole(tensor_cores: None) -> None:
    torch.manual_seed(0)
    directions, states = torch.randn(5, 64), torch.randn(7, 64)
    half: Any = SimpleNamespace(
        states=states, present=torch.zeros(1, 7, dtype=torch.bool), sentence=torch.arange(7)
    )
    expected = directions @ states.T
    older()
    scores = direction_method("random", directions, False).scores(half)
    assert torch.equal(scores(torch.arange(5)), expected)
    assert not torch.equal(directions @ states.T, expected)


def test_features_of_images_are_computed_without_tf32(tmp_path: Path) -> None:
    """Which torch allows in convolutions, unless it is told otherwise."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(tmp_path)
    encoder = ImageEncoder(tmp_path, torch.device("cpu"))
    seen = []
    encoder.model.register_forward_pre_hook(lambda *_: seen.append(settings()))
    before = settings()
    assert before["conv"] == "tf32"
    encoder(torch.zeros(2, 3, 16, 16))
    assert seen[0]["conv"] in ("ieee", "none")
    assert settings() == before
