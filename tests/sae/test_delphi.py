"""A cache for delphi, read back as its loader reads it."""

import json

import numpy
import pytest
import torch
from safetensors.numpy import load_file
from small_world import LATENTS, small_world

from dlmctl.sae.features.delphi import DelphiCache, _split

WORLD = small_world()


def loaded(module):
    """Locations with features counted from 0, activations and tokens of all files, in order."""
    files = sorted(module.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0]))
    ends = [tuple(map(int, file.stem.split("_"))) for file in files]
    assert [first for first, _ in ends] == [0, *(last + 1 for _, last in ends[:-1])]
    assert ends[-1][1] == LATENTS - 1
    parts = [load_file(file) for file in files]
    for part, (first, last) in zip(parts, ends, strict=True):
        assert part["locations"].dtype == numpy.uint16
        assert part["activations"].dtype == numpy.float16
        assert part["tokens"].dtype == numpy.int64
        part["locations"] = part["locations"] + numpy.array([0, 0, first])
        assert (part["locations"][:, 2] <= last).all()
    return parts


@pytest.mark.parametrize("batch_size", [7, 60])
def test_the_cache_holds_every_activation_at_its_place(tmp_path, batch_size):
    directory = tmp_path / "made" / "cache"
    with DelphiCache(directory, LATENTS, torch.arange(LATENTS), WORLD.policy.pad_id) as cache:
        stream = WORLD.stream("mask", batch_size)
        passed = sum(len(active.value) for active in cache.recorded(stream))
        cache.write("model.layers.1", {"model_name": "tiny"})
    parts = loaded(directory / "model.layers.1")
    sights = WORLD.sights("mask")
    width = max(len(sight.codes) for sight in sights)
    dense = numpy.zeros((len(sights), width, LATENTS))
    count = 0
    for part in parts:
        dense[tuple(part["locations"].T)] = part["activations"]
        count += len(part["activations"])
        for sight, row in zip(sights, part["tokens"], strict=True):
            ids = sight.document.ids
            assert row.tolist() == ids + [WORLD.policy.pad_id] * (width - len(ids))
    for sight, row in zip(sights, dense, strict=True):
        expected = numpy.zeros_like(row)
        expected[: len(sight.codes)] = sight.codes
        numpy.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-6)
    assert count == passed == (dense > 0).sum()
    config = json.loads((directory / "model.layers.1" / "config.json").read_text())
    assert config["model_name"] == "tiny"
    assert (config["ctx_len"], config["n_splits"]) == (width, 5)
    assert [path.name for path in tmp_path.joinpath("made").iterdir()] == ["cache"]


def test_features_asked_for_keep_their_numbers(tmp_path):
    with DelphiCache(tmp_path / "cache", LATENTS, torch.tensor([31, 2]), 0) as cache:
        for _ in cache.recorded(WORLD.stream("mask", 9, (31, 2))):
            pass
        cache.write("m", {})
    parts = loaded(tmp_path / "cache" / "m")
    assert {int(f) for part in parts for f in part["locations"][:, 2]} == {2, 31}


def test_numbers_that_do_not_fit_get_larger_types_and_large_activations_stay_finite():
    bits = torch.tensor([1e6, 0.5]).view(torch.int32).tolist()
    entries = torch.tensor([[70000, 3, 12, bits[0]], [4, 5, 10, bits[1]]], dtype=torch.int32)
    found = _split(entries, 10)
    assert found["locations"].dtype == torch.uint32
    assert found["locations"].tolist() == [[4, 5, 0], [70000, 3, 2]]
    assert found["activations"].tolist() == [0.5, 65504.0]
    assert _split(entries[1:], 10)["locations"].dtype == torch.uint16
    assert _split(entries[:0], 10)["locations"].shape == (0, 3)


def test_what_waits_is_removed_when_the_corpus_breaks_off(tmp_path):
    def broken(cache):
        with cache:
            next(cache.recorded(WORLD.stream("mask", 9)))
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken(DelphiCache(tmp_path / "cache", LATENTS, torch.arange(LATENTS), 0))
    assert list(tmp_path.iterdir()) == []
