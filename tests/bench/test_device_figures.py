"""`bench gpu`: what it measures, and what it says of what it could not measure."""

import orjson
import pytest
import torch
from conftest import invoke

from dlmctl.bench import gpu
from dlmctl.bench.gpu import device_figures
from dlmctl.bench.measuring import Measurement, Prepared, Stopwatch, measured
from dlmctl.rl import gradient
from dlmctl.settings.bench import DeviceWork
from dlmctl.settings.compute import Device

CPU = torch.device("cpu")
SMALL = DeviceWork(
    prompt_length=4, gen_length=16, block_length=8, steps=8, batch_sizes="1,2", completions=3,
    masks=2, rank=2, micro_batch=4, vectors=64,
)  # fmt: skip
OPTIONS = (
    "gpu -m random:tiny --prompt-length 4 --gen-length 16 --block-length 8 --steps 8 "
    "--batch-size 1,2 -n 3 -k 2 --lora-rank 2 --update-batch-size 4 --vectors 64 --device"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_every_part_has_its_figures(device, monkeypatch):
    # The graph is captured as for the real compiler, which would take half a minute.
    monkeypatch.setattr("dlmctl.models.compiled.COMPILER", "aot_eager")
    done = invoke("bench", *OPTIONS.split(), device)
    assert done.exit_code == 0, done.output
    rows = [orjson.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "left_out" in row]
    sampled = [row for row in rows if row["what"] == "rollout"]
    assert [(row["path"], row["temperature"], row["batch_size"]) for row in sampled] == [
        *(
            (path, temperature, size)
            for size in (2, 1)
            for temperature in (1.0, 0.0)
            for path in ("exact", "dual", "dual+threshold")
        ),
        ("compiled", 0.0, 2),
        ("compiled", 0.0, 1),
    ]
    for row in sampled:
        assert row["value"] * row["seconds"] == pytest.approx(8 * row["batch_size"])
        assert ("tflops" in row) == (row["threshold"] is None)
        assert row["nfe"] == 4 if row["threshold"] is None else 0 < row["nfe"] <= 4
        length = 8 if row["cache"] == "dual" else 20
        assert row["pass_tokens"] == row["batch_size"] * length
    others = [row for row in rows if row["what"] != "rollout"]
    assert [(row["what"], row.get("gradient_checkpointing")) for row in others] == [
        ("scoring", None), ("update", False), ("update", True), ("sae", None), ("neighbours", None),
    ]  # fmt: skip
    assert [round(row["value"] * row["seconds"]) for row in others] == [3, 3, 3, 4 * 2048, 64]
    assert [row["latents"] for row in others if row["what"] == "sae"] == [4 * 32]
    for row in rows:
        assert row["device"].startswith("cpu (") or row["device"] == torch.cuda.get_device_name()
        assert (row["model"], row["parameters"]) == ("random:tiny", 89_248)


def test_a_gradient_that_fits_only_with_recomputing_is_none_without(monkeypatch):
    whole, failures = gradient._accumulate, iter([True])

    def accumulate(*arguments):
        if next(failures, False):
            raise torch.OutOfMemoryError
        return whole(*arguments)

    monkeypatch.setattr(gradient, "_accumulate", accumulate)
    work = DeviceWork(**{**SMALL.__dict__, "parts": "update"})
    without, recomputing = device_figures("random:tiny", work, Device("cpu", "float32"))
    assert without["value"] is None
    assert without["left_out"] == "out of memory"
    assert not without["gradient_checkpointing"]
    assert recomputing["value"] > 0
    assert recomputing["gradient_checkpointing"]


def test_a_gradient_that_fails_leaves_no_memory_in_use(monkeypatch):
    policies, real = [], gpu.GradientWork.update

    def update(work, size):
        real(work, size)
        policies.append(work.policy)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu.GradientWork, "update", update)
    work = DeviceWork(**{**SMALL.__dict__, "parts": "update"})
    rows = list(device_figures("random:tiny", work, Device("cpu", "float32")))
    assert [row["left_out"] for row in rows] == ["out of memory"] * 2
    assert all(p.grad is None for policy in policies for p in policy.model.parameters())


def test_when_the_seconds_are_over_nothing_more_is_measured():
    rows = list(
        device_figures(
            "random:tiny", DeviceWork(**{**SMALL.__dict__, "seconds": 0.0}), Device("cpu")
        )
    )
    assert len(rows) == 19
    assert {row["left_out"] for row in rows} == {"its part of --seconds was over"}
    assert {row["value"] for row in rows} == {None}


class Clock:
    """A clock that work moves on."""

    now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds, done=None):
        def work():
            self.now += seconds
            if done is not None:
                done.append(seconds)

        return work


def test_work_that_does_not_fit_into_the_seconds_is_left_out_and_shorter_work_is_not():
    clock, done = Clock(), []
    long = Measurement("x/s", 60.0, clock.takes(30.0, done), clock.takes(3.0), 10)
    short = Measurement("x/s", 60.0, clock.takes(12.0, done), clock.takes(1.0), 10)
    prepared = [
        Prepared("long", lambda: long),
        Prepared("its part", lambda: short, 0.3),
        Prepared("short", lambda: short),
        Prepared("again", lambda: short),
    ]
    rows = list(measured(prepared, Stopwatch(CPU, 30.0, clock), {}))
    assert done == [12.0]
    assert "about 30 s, and 24 s" in rows[0]["left_out"]
    assert "about 10 s, and 1 s" in rows[1]["left_out"]
    assert (rows[2]["value"], rows[2]["seconds"]) == (5.0, 12.0)
    assert "about 10 s, and 6 s" in rows[3]["left_out"]


def test_what_does_not_fit_into_memory_is_left_out_and_other_errors_are_not_hidden():
    def fails(error):
        def work():
            raise error

        return work

    full, fine = fails(torch.OutOfMemoryError()), lambda: None
    host = fails(RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    prepared = [
        Prepared("work", lambda: Measurement("x/s", 1.0, full, fine, 1, {"size": 3})),
        Prepared("warm-up", lambda: Measurement("x/s", 1.0, fine, host, 1)),
        Prepared("prepared", full),
        Prepared("fine", lambda: Measurement("x/s", 1.0, fine, fine, 1, flops=3e12)),
    ]
    *rows, last = measured(prepared, Stopwatch(CPU, 60.0), {"device": "d"})
    assert [row["left_out"] for row in rows] == ["out of memory"] * 3
    assert rows[0]["size"] == 3
    assert last["tflops"] == pytest.approx(3 * last["value"])
    shape = fails(RuntimeError("shape"))
    broken = [Prepared("broken", lambda: Measurement("x/s", 1.0, shape, fine, 1))]
    with pytest.raises(RuntimeError, match="shape"):
        list(measured(broken, Stopwatch(CPU, 60.0), {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "rollout,speed"], "--parts has no 'speed'"),
        (["--steps", 7, "--gen-length", 256], "less than one step for each of the 8 blocks"),
        (["--block-length", 300], "--block-length 300 is more than --gen-length 256"),
        (["--batch-size", "1,x"], "--batch-size 1,x is not"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    done = invoke("bench", "gpu", "-m", "random:tiny", *options)
    assert (done.exit_code, message in done.output) == (2, True), done.output


@pytest.mark.parametrize("family", ["ar", "bd3lm"])
def test_models_that_do_not_attend_to_the_whole_sequence_are_refused(family, saved_models):
    done = invoke("bench", "gpu", "-m", saved_models(family))
    assert (done.exit_code, "attend to the whole sequence" in done.output) == (2, True)


def test_without_a_compiler_the_record_says_so(monkeypatch):
    monkeypatch.setattr("dlmctl.models.compiled.which", lambda name: None)
    work = DeviceWork(**{**SMALL.__dict__, "parts": "compile"})
    rows = list(device_figures("random:tiny", work, Device("cpu")))
    assert [row["value"] for row in rows] == [None, None]
    assert all("needs a C++ compiler" in row["left_out"] for row in rows)
