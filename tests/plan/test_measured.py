"""`dlmctl plan --measured`: which speeds it takes from the records of `bench gpu`."""

import orjson
import pytest
from conftest import invoke
from test_plan import counted

from dlmctl.bench import gpu
from dlmctl.bench.shapes import bench_policy
from dlmctl.settings.bench import DeviceWork
from dlmctl.settings.optimizer import Adapter
from dlmctl.train.lora import add_adapter

SIZES = ("--prompt-length", 6, "--gen-length", 16, "--block-length", 8, "--steps", 8)
STEP = (*SIZES, "-n", 2, "--prompts-per-step", 4, "--rollout-batch-size", 2, "--batch-size", 4)
WORK = DeviceWork(
    prompt_length=6,
    gen_length=16,
    block_length=8,
    steps=8,
    completions=2,
    masks=2,
    rank=2,
    micro_batch=4,
)


@pytest.fixture(scope="module")
def file(saved_models, tmp_path_factory):
    """Records of a small saved model, measured here."""
    path = tmp_path_factory.mktemp("measured") / "measured.jsonl"
    done = invoke(
        "bench", "gpu", "-m", saved_models("llada"), *SIZES, "--batch-size", "2", "-n", 2, "-k", 2,
        "--lora-rank", 2, "--parts", "rollout,update", "--device", "cpu", "--dtype", "float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    path.write_text(done.stdout)
    return path


def records(file):
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def changed(tmp_path, file, change):
    """A file of the records that `change` returns, each changed as it likes, or None."""
    path = tmp_path / "changed.jsonl"
    rows = [row for record in records(file) if (row := change(record)) is not None]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def planned(model, file, *options):
    done = invoke("plan", "-m", model, *STEP, "--measured", file, *options)
    assert done.exit_code == 0, done.output
    return {row["stage"]: row for row in map(orjson.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize(("asked", "temperature"), [(0.0, 0.0), (1.0, 1.0), (0.9, 1.0)])
def test_the_model_that_was_measured_is_planned_at_its_tokens_per_second(
    cache, asked, temperature, file, saved_models
):
    [rollout] = [
        row
        for row in records(file)
        if row["what"] == "rollout"
        and (row["cache"], row["temperature"], row["threshold"]) == (cache, temperature, None)
    ]
    options = ("--cache", cache, "--temperature", asked)
    rows = planned(saved_models("llada"), file, *options)
    assert rows["rollout"]["seconds"] == pytest.approx(8 * 16 / rollout["value"])
    assert rows["step"]["measured_on"] == rollout["device"]
    # What a threshold saves is not counted.
    bounded = planned(
        saved_models("llada"), file, *options, "--threshold", 0.9,
        *(("--refresh-below", 0.9) if cache == "dual" else ()),
    )  # fmt: skip
    assert bounded["rollout"]["seconds"] == rows["rollout"]["seconds"]


@pytest.mark.parametrize("recomputes", [False, True])
def test_an_update_takes_its_operations_at_the_measured_speed(recomputes, file, saved_models):
    options = ["--lora-rank", 2, *(["--gradient-checkpointing"] if recomputes else [])]
    update = planned(saved_models("llada"), file, *options)["update"]
    [record] = [row for row in records(file) if row.get("gradient_checkpointing") == recomputes]
    assert update["seconds"] == pytest.approx(update["flops"] / record["tflops"] / 1e12)


def test_the_operations_of_another_shape_are_carried_over(file, saved_models):
    dream = planned(saved_models("dream"), file, "--lora-rank", 2)
    [rollout] = [
        row for row in records(file) if (row.get("path"), row.get("temperature")) == ("exact", 1.0)
    ]
    seconds = dream["rollout"]["flops"] / rollout["tflops"] / 1e12
    assert dream["rollout"]["seconds"] == pytest.approx(seconds)


def test_a_speed_of_sampling_that_is_given_is_kept(file, saved_models):
    rows = planned(saved_models("llada"), file, "--tokens-per-second", 64)
    assert rows["rollout"]["seconds"] == 2
    assert planned(saved_models("ar"), file, "--tokens-per-second", 64)["rollout"]["seconds"] == 2


def test_an_update_that_does_not_fit_is_replaced_by_one_that_recomputes(
    tmp_path, file, saved_models
):
    def without(record):
        if record.get("gradient_checkpointing") is False:
            del record["tflops"]
            record |= {"value": None, "left_out": "out of memory"}
        return record

    update = planned(saved_models("llada"), changed(tmp_path, file, without))["update"]
    [record] = [row for row in records(file) if row.get("gradient_checkpointing")]
    assert update["seconds"] == pytest.approx(update["flops"] / record["tflops"] / 1e12)


def test_what_a_file_lacks_or_measured_otherwise_is_refused(tmp_path, file, saved_models):
    model = saved_models("llada")

    def refused(code, message, change=lambda record: record, options=(), of=model):
        path = changed(tmp_path, file, change)
        done = invoke("plan", "-m", of, *STEP, "--measured", path, *options)
        assert (done.exit_code, message in done.output) == (code, True), done.output

    def spoilt(record):
        kept = {name: record[name] for name in record if name not in ("tflops", "value")}
        return kept | {"left_out": "--seconds were over"}

    refused(65, "no update was measured", lambda r: r if r["what"] == "rollout" else None)
    refused(65, "(left out: --seconds were over)", spoilt)
    refused(65, "no sampling with --cache none", lambda r: r if r["what"] == "update" else None)
    refused(65, "no sampling with --cache prefix", options=["--cache", "prefix"])
    refused(65, "in passes of about 110 tokens", options=["--rollout-batch-size", 5])
    refused(65, "parameters, and", lambda r: {**r, "parameters": 5 * r["parameters"]})
    refused(65, "parameters, and", lambda r: {**r, "parameters": r["parameters"] // 5})
    refused(65, "field 'tflops' is str", lambda r: {**r, "tflops": "many"})
    refused(65, "field 'pass_tokens' is missing", lambda r: {**r, "pass_tokens": None})
    refused(2, "give --tokens-per-second too", of=saved_models("ar"))
    refused(2, "--tflops and --measured", options=["--tflops", 3])
    assert invoke("plan", "-m", model, "--measured", tmp_path / "none").exit_code == 66


@pytest.mark.parametrize("path", ["exact", "dual"])
def test_operations_of_a_sampled_block_are_those_of_the_sampler(path):
    policy = bench_policy("random:tiny", "cpu", "float32")
    one = gpu.sampling(policy, WORK, path, 0.0, 2)
    assert one.flops == pytest.approx(counted(one.work), rel=0.02)


def test_operations_of_scores_and_gradients_are_those_of_their_passes():
    policy = bench_policy("random:tiny", "cpu", "float32")
    one = gpu.scoring(policy, WORK)
    assert one.flops == pytest.approx(counted(one.work), rel=0.02)
    adapted = add_adapter(policy, Adapter(2))
    for recomputes in (False, True):
        one = gpu.updating(lambda: adapted, WORK, recomputes)
        # Of two layers the first is not asked for the gradient by its inputs.
        assert one.flops == pytest.approx(counted(one.work), rel=0.1)
