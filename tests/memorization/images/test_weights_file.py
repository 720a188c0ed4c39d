"""Weights are read from safetensors and plain state dicts; what could run code is refused."""

import hashlib
import pickle
import random
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dlmctl.memorization.images.weights_file import load_exactly, read_state, sha256
from dlmctl.records.errors import DataError, MissingInputError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def test_a_state_dict_is_read(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    save_file(STATE, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        found = read_state(tmp_path / name)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[key], STATE[key]) for key in STATE)


class Command:
    """Unpickled without restriction, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_runs_when_weights_are_read(tmp_path):
    for number, write in enumerate(
        (torch.save, lambda what, to: to.write_bytes(pickle.dumps(what, protocol=2)))
    ):
        file, trace = tmp_path / f"{number}.pth", tmp_path / f"{number}.trace"
        write({"a": Command(trace)}, file)
        with pytest.raises(DataError, match=r"it was not run|a pickle is not read"):
            read_state(file)
        assert not trace.exists()


def test_an_old_file_is_refused_with_the_way_to_convert_it(tmp_path):
    file, converted = tmp_path / "old.pth", tmp_path / "new.safetensors"
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="a pickle is not read") as refused:
        read_state(file)
    command = shlex.split(refused.value.message[refused.value.message.index("python -c") :])
    code = command[command.index("-c") + 1]
    subprocess.run([sys.executable, "-c", code, file, converted], check=True)
    found = read_state(converted)
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_torchscript_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "net.torchscript.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(file))
    with pytest.raises(DataError, match=r"TorchScript, a program, .*\.torchvision\.pt"):
        read_state(file)


def test_what_is_no_weights_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="no file"):
        read_state(tmp_path / "none.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"step": 3}, tmp_path / "number.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(STATE, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:400])
    (tmp_path / "cut.safetensors").write_bytes(b"{}")
    for name in ("list.pth", "number.pth", "empty.pth", "cut.pth", "cut.safetensors"):
        with pytest.raises(DataError, match=name):
            read_state(tmp_path / name)


def test_a_damaged_file_is_read_or_refused(tmp_path):
    """Whatever byte is another one: no traceback."""
    torch.save(STATE, tmp_path / "w.pth")
    whole, refused = (tmp_path / "w.pth").read_bytes(), 0
    for seed in range(150):
        draw = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 20))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "w.pth").write_bytes(damaged)
        try:
            read_state(tmp_path / "w.pth")
        except DataError:
            refused += 1
    assert refused > 20


def test_weights_fit_exactly_or_not_at_all(tmp_path):
    network, path = nn.ModuleDict({"a": nn.Linear(3, 2), "n": nn.BatchNorm1d(2)}), tmp_path / "w"
    state = {**network.state_dict(), **STATE}
    del state["n.num_batches_tracked"]  # older files have none
    load_exactly(network, state, path, "a network")
    assert torch.equal(network["a"].weight, STATE["a.weight"])
    for change, message in (
        ({"b": torch.ones(1)}, "b belongs to no part of a network"),
        ({"a.bias": torch.ones(3)}, r"a.bias has the shape \[3\], and that of a network \[2\]"),
    ):
        with pytest.raises(DataError, match=message):
            load_exactly(network, {**state, **change}, path, "a network")
    del state["a.bias"]
    with pytest.raises(DataError, match=r"a\.bias is missing"):
        load_exactly(network, state, path, "a network")


def test_the_hash_is_that_of_the_file(tmp_path):
    file = tmp_path / "w"
    file.write_bytes(bytes(range(256)) * 20_000)
    assert sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
