"""Files of torch.save, read as data: the same tensors, and nothing that is run."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dlmctl.models.torch_archive import read_torch_archive
from dlmctl.records.errors import DataError


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def test_tensors_come_back_as_torch_reads_them(tmp_path):
    base = torch.randn(4, 6)
    value = {
        "matrix": base,
        "transposed": base.T,
        "part of another": base[1:, ::2],
        "scalar": torch.tensor(7),
        "half": torch.randn(3).half(),
        "wide": torch.randn(2).double(),
        "brain": torch.randn(5).bfloat16(),
        "truth": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "nested": {"numbers": [1, 300, 70_000, -5, 2**40, 0.5], "text": "é", "none": None},
        "pair": (1, 2),
        "many": tuple(range(5)),
        "yes": True,
    }
    path = saved(tmp_path / "a.pt", value)
    expected = torch.load(path, weights_only=True)
    found = read_torch_archive(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor.detach())
        else:
            assert found[name] == tensor


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_state_dict_of_a_module_is_read_whatever_the_protocol(tmp_path, protocol):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    path = saved(tmp_path / "a.pt", module.state_dict(), pickle_protocol=protocol)
    found = read_torch_archive(path)
    assert all(torch.equal(found[k], v) for k, v in module.state_dict().items())


class Malice:
    def __reduce__(self):
        return os.mkdir, ("made-by-the-file",)


def test_calls_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pt", {"x": torch.zeros(2), "y": Malice()})
    with pytest.raises(DataError, match=r"calls \w+\.mkdir.*it was not run"):
        read_torch_archive(path)
    with pytest.raises(DataError, match="calls"):
        read_torch_archive(saved(tmp_path / "b.pt", {"counter": collections.Counter("aa")}))
    assert not Path("made-by-the-file").exists()


def rewritten(path, **entries):
    """The archive with other bytes in some of its entries."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(parts)).split("/")[0]
    parts |= {f"{folder}/{name.replace('_', '/')}": data for name, data in entries.items()}
    other = path.with_name("other.pt")
    with zipfile.ZipFile(other, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return other


def test_storages_that_are_too_short_and_shapes_too_large_are_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"x": torch.zeros(4)})
    with pytest.raises(DataError, match="has 8 bytes, expected 16"):
        read_torch_archive(rewritten(path, data_0=bytes(8)))
    huge = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(DataError, match="larger than its storage"):
        read_torch_archive(saved(tmp_path / "b.pt", {"x": huge}))


@pytest.mark.parametrize("program", [b"", b".", b"\x80\x02}", b"\x80\x02(t.", b"0.", b"\xff"])
def test_programs_that_make_no_sense_are_refused(tmp_path, program):
    whole = saved(tmp_path / "a.pt", {"x": torch.zeros(4)})
    with pytest.raises(DataError, match=r"other\.pt"):
        read_torch_archive(rewritten(whole, **{"data.pkl": program}))
    assert read_torch_archive(rewritten(whole, **{"data.pkl": b"\x80\x02}."})) == {}


def test_a_program_cannot_ask_for_memory(tmp_path):
    whole = saved(tmp_path / "a.pt", {"x": torch.zeros(4)})
    size = b"\x8a\x08" + (2**40).to_bytes(8, "little")
    for name in (b"builtins\nbytearray", b"torch\nTensor"):
        program = b"\x80\x02}X\x01\x00\x00\x00xc" + name + b"\n" + size + b"\x85Rs."
        with pytest.raises(DataError, match="it was not run"):
            read_torch_archive(rewritten(whole, **{"data.pkl": program}))


def test_compressed_storages_are_refused(tmp_path):
    path, other = saved(tmp_path / "a.pt", {"x": torch.zeros(2**16)}), tmp_path / "other.pt"
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    with pytest.raises(DataError, match="compressed"):
        read_torch_archive(other)


def test_every_cut_of_a_file_is_refused_in_one_line(tmp_path):
    whole = saved(tmp_path / "a.pt", {"x": torch.arange(6.0)}).read_bytes()
    for length in range(0, len(whole) - 1, 37):
        path = tmp_path / "cut.pt"
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_torch_archive(path)


def test_other_files_are_refused(tmp_path):
    old = tmp_path / "old.pt"
    torch.save({"x": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="not a whole file"):
        read_torch_archive(old)
    stream = io.BytesIO()
    pickle.dump({}, stream)
    (tmp_path / "bare.pt").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="not a whole file"):
        read_torch_archive(tmp_path / "bare.pt")
    with pytest.raises(DataError, match="dictionary"):
        read_torch_archive(saved(tmp_path / "list.pt", [1, 2]))
