"""Tables on a terminal: whole cells, whatever its width."""

import pytest

from dlmctl.commands.tables import print_table, with_error


def printed(rows, columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(rows, {name: name for name in columns})
    return capsys.readouterr().out


def row(layer, k, value=0.123456):
    return {"layer": layer, "k": k, **{f"a_long_measure_{n}": value for n in range(6)}}


def test_a_table_that_fits_is_one(monkeypatch, capsys):
    said = printed([row(1, 8)], row(1, 8), 200, monkeypatch, capsys)
    assert len(said.splitlines()) == 2


def test_a_wide_table_becomes_several_with_the_columns_that_tell_rows_apart(monkeypatch, capsys):
    rows = [row(1, 8), row(1, 32), row(2, 8)]
    said = printed(rows, rows[0], 60, monkeypatch, capsys)
    tables = [part.splitlines() for part in said.split("\n\n")]
    assert len(tables) == 3
    assert all(table[0].split()[:2] == ["layer", "k"] for table in tables)
    assert [line.split()[:2] for line in tables[2][1:]] == [["1", "8"], ["1", "32"], ["2", "8"]]
    headings = [name for table in tables for name in table[0].split()[2:]]
    assert headings == [f"a_long_measure_{n}" for n in range(6)]
    assert "\u2026" not in said
    assert max(map(len, said.splitlines())) <= 60


def test_long_names_leave_room_for_their_numbers(monkeypatch, capsys):
    rows = [{"task": "t" * 40, "reward": 0.5}, {"task": "u" * 40, "reward": 1.0}]
    said = printed(rows, ["task", "reward"], 50, monkeypatch, capsys)
    assert said.splitlines()[1] == f"{'t' * 40}     0.5"


@pytest.mark.parametrize("text", ["[red]", "pip install 'dlmctl[eval]'", "[/]"])
def test_brackets_are_no_markup(text, monkeypatch, capsys):
    assert text in printed([{"what": text}], ["what"], 80, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("value", "error", "cell"),
    [
        (0.41234, 0.0312, "0.412 ± 0.031"),
        (-0.00052, 0.00011, "-0.00052 ± 0.00011"),
        (1234.5, 56.7, "1234 ± 57"),
        (0.5, 1e-9, "0.500000 ± 0.000000"),
        (0.5, 0.0, "0.5"),
        (0.5, None, "0.5"),
        (None, 0.1, "-"),
    ],
)
def test_an_error_stands_behind_its_number_with_two_digits(value, error, cell):
    assert with_error({"x": value, "x_se": error}, "x") == cell
