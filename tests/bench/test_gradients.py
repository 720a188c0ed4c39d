"""`bench update` compares one gradient with the same gradient."""

import orjson
import pytest
from conftest import shell, tiny_policy

from dlmctl.bench.memory import CLEAR
from dlmctl.bench.update import compare_gradients
from dlmctl.settings.bench import GradientStep
from dlmctl.settings.optimizer import Adapter
from dlmctl.train.lora import add_adapter


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_plain_gradient_is_that_of_update(family):
    policy, reference = tiny_policy(family, seed=1), tiny_policy(family, seed=2)
    rows = list(compare_gradients(policy, reference, GradientStep(7, 5, 3, 4, repeats=1), [4, 1]))
    assert [(row["path"], row["batch_size"]) for row in rows] == [
        ("plain", 4),
        ("update", 4),
        ("update", 1),
    ]
    assert rows[0]["difference"] == 0
    assert all(row["difference"] < 1e-6 for row in rows)  # the plain one's softmax is float32
    assert rows[1]["ratio"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"])


def test_with_an_adapter_the_reference_is_the_model_without_it():
    policy = add_adapter(tiny_policy(), Adapter(2, 4.0))
    plain, ours = compare_gradients(policy, None, GradientStep(7, 5, 3, 2, repeats=1), [3])
    assert plain["difference"] == 0
    assert ours["difference"] < 1e-6


def test_the_command_writes_a_row_for_each_batch_size(tmp_path):
    line = "dlmctl bench update -m random:tiny --gen-length 16 --prompt-length 4 --repeats 1"
    done = shell(f"{line} --batch-size 2,1", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [orjson.loads(text) for text in done.stdout.splitlines()]
    assert [row["batch_size"] for row in rows] == [4, 2, 1]
    assert all(row["difference"] < 1e-4 for row in rows)
    assert (rows[1]["peak_memory_mb"] is not None) == CLEAR.exists()
    wrong = shell(f"{line} --batch-size 2,x", tmp_path)
    assert wrong.returncode == 2
    assert "--batch-size 2,x is not" in wrong.stderr
