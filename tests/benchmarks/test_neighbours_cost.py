"""neighbours.py: both paths run, ratios are those of the seconds, and neighbours are right."""

import neighbours
import orjson
import pytest
from typer.testing import CliRunner


@pytest.mark.parametrize("memory", ["64K", "512M"])
def test_neighbours_compared_with_the_product(memory):
    line = "-n 301 --references 203 --width 40 --repeats 2 --device cpu --json --memory"
    done = CliRunner().invoke(neighbours.app, [*line.split(), memory])
    assert done.exit_code == 0, done.stderr
    product, nearest = map(orjson.loads, done.stdout.splitlines())
    assert (product["path"], nearest["path"]) == ("product", "nearest")
    assert product["ratio"] == 1
    assert nearest["ratio"] == pytest.approx(nearest["seconds"] / product["seconds"])
    assert (product["wrong"], nearest["wrong"]) == (None, 0)


def test_a_wrong_search_is_noticed(monkeypatch):
    right = neighbours.nearest
    monkeypatch.setattr(
        neighbours,
        "nearest",
        lambda *given: right(*given)._replace(indices=right(*given).indices.flip(1)),
    )
    line = "-n 20 --references 20 --width 4 --device cpu --json"
    done = CliRunner().invoke(neighbours.app, line.split())
    assert orjson.loads(done.stdout.splitlines()[1])["wrong"] == 16
