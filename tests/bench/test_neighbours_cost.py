"""`bench neighbours`: both paths run, ratios are those of the seconds, and neighbours are right."""

import orjson
import pytest
from conftest import invoke


@pytest.mark.parametrize("memory", ["64K", "512M"])
def test_neighbours_beside_the_product(memory):
    line = "neighbours -n 301 --references 203 --width 40 --repeats 2 --device cpu --json --memory"
    done = invoke("bench", *line.split(), memory)
    assert done.exit_code == 0, done.stderr
    product, nearest = map(orjson.loads, done.stdout.splitlines())
    assert (product["path"], nearest["path"]) == ("product", "nearest")
    assert product["ratio"] == 1
    assert nearest["ratio"] == pytest.approx(nearest["seconds"] / product["seconds"])
    assert (product["wrong"], nearest["wrong"]) == (None, 0)


def test_a_wrong_search_is_noticed(monkeypatch):
    from dlmctl.bench import neighbours

    right = neighbours.nearest
    monkeypatch.setattr(
        neighbours,
        "nearest",
        lambda *given: right(*given)._replace(indices=right(*given).indices.flip(1)),
    )
    line = "neighbours -n 20 --references 20 --width 4 --device cpu --json"
    done = invoke("bench", *line.split())
    assert orjson.loads(done.stdout.splitlines()[1])["wrong"] == 16
