"""Commands under torchrun in tests: several processes on one machine, beside a single one."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import orjson
import pytest
import torch
from conftest import read_jsonl
from preload import parent
from preloaded import Command
from safetensors.torch import load_file

NUMBER = re.compile(r"-?\d[\d.]*(e[-+]?\d+)?")


def write(path: Path, records: list[dict]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


class Ranks:
    """`dlmctl` in several processes, started as torchrun does."""

    def __init__(
        self, line: str, cwd: Path, given: Path, count: int = 2, output: int | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.out = [cwd / f"out-{rank}" for rank in range(count)]
        self.err = [cwd / f"err-{rank}" for rank in range(count)]
        self.commands = []
        for rank in range(count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "CUDA_VISIBLE_DEVICES": "",
            }
            with (
                given.open("rb") as records,
                self.out[rank].open("wb") as out,
                self.err[rank].open("wb") as err,
            ):
                to = out.fileno() if output is None or rank else output
                files = [records.fileno(), to, err.fileno()]
                self.commands.append(Command(parent(), line.split(), files, cwd, environment))

    def done(self) -> list[dict]:
        """The metrics, when all have ended well."""
        codes = [command.wait() for command in self.commands]
        assert codes == [0] * len(codes), "".join(err.read_text() for err in self.err)
        assert all(not out.read_bytes() for out in self.out[1:])
        return read_jsonl(self.out[0])


DIFFERENCES = {"kl": 1e-3, "mask_variance": 1e-3}
"""Relative tolerances of differences that are small compared with the log-probabilities in them."""


def same_metrics(one: list[dict], other: list[dict]) -> None:
    timing = {"run", "seconds", "tokens_per_second", "peak_memory_mb"}
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - timing:
            expected = a[key]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=DIFFERENCES.get(key, 1e-5), abs=1e-6)
            assert b[key] == expected, key


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype
                # Attention does not depend on the bias of keys, or hardly, where places turn it
                # slowly: its gradient is rounding, which Adam blows up to steps of the learning
                # rate.
                atol = 3e-3 if key.endswith(("key.bias", "k_proj.bias")) else 1e-6
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=atol, msg=key)
        elif name == "adapter_config.json":  # peft writes a set, in the order of its hashes
            a, b = (orjson.loads((run / name).read_bytes()) for run in (one, other))
            assert set(a.pop("target_modules")) == set(b.pop("target_modules"))
            assert a == b
        elif name == "README.md":  # with metrics, which are not the same to the last digit
            a, b = (NUMBER.sub("#", (run / name).read_text()) for run in (one, other))
            assert a == b
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
