"""Generated problems: solvable, unique, and on one side of the split."""

import random
import re
import sys
import types
from fractions import Fraction
from itertools import count, islice

import pytest

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.prompts import Prompts
from dlmctl.tasks import countdown, sources, sudoku
from dlmctl.tasks.columns import to_record
from dlmctl.tasks.sources import prompts
from dlmctl.verifiers.countdown import countdown as countdown_verifier
from dlmctl.verifiers.countdown import countdown_steps
from dlmctl.verifiers.numeric import gsm8k
from dlmctl.verifiers.sudoku import sudoku as sudoku_verifier
from dlmctl.verifiers.sudoku import sudoku_units


def brute_force(puzzle):
    """All solutions by trying digits cell by cell, nothing shared with the package."""
    if "0" not in puzzle:
        return [puzzle]
    size = int(len(puzzle) ** 0.5)
    high, wide = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    cell = puzzle.index("0")
    row, column = divmod(cell, size)
    seen = set(puzzle[size * row : size * row + size]) | set(puzzle[column::size])
    top, left = row // high * high, column // wide * wide
    seen |= {puzzle[size * (top + r) + left + c] for r in range(high) for c in range(wide)}
    found = []
    for digit in set("123456789"[:size]) - seen:
        found += brute_force(puzzle[:cell] + digit + puzzle[cell + 1 :])
    return found


def test_there_are_288_grids_and_the_split_is_fixed():
    assert len(set(sudoku.all_grids())) == 288
    train, test = set(sudoku.split_grids("train")), set(sudoku.split_grids("test"))
    assert (len(train), len(test), len(train & test)) == (200, 88, 0)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("size", "count"), [(4, 60), (6, 20), (9, 4)])
def test_every_puzzle_has_one_solution_and_it_is_of_its_split(size, count, split):
    for puzzle, solution in islice(sudoku.puzzles(split, (4, 11), 3, size), count):
        assert brute_force(puzzle) == [solution]
        if size == 4:
            assert solution in sudoku.split_grids(split)
        else:
            assert countdown.side_of(solution) == split
        assert 4 <= puzzle.count("0") <= 11
        assert len(puzzle) == size**2


@pytest.mark.parametrize(("size", "clues"), [(4, 3), (6, 22), (9, 45)])
def test_the_solver_finds_every_solution_of_a_puzzle_with_several(size, clues):
    several = 0
    for seed in range(8):
        draw = random.Random(seed)
        grid = next(sudoku.solutions("0" * size**2, draw))
        kept = draw.sample(range(size**2), clues)
        puzzle = "".join(digit if cell in kept else "0" for cell, digit in enumerate(grid))
        found = list(sudoku.solutions(puzzle))
        assert sorted(found) == sorted(brute_force(puzzle))
        several += len(found) > 1
    assert several


@pytest.mark.parametrize("clash", ["11" + "0" * 34, "1" + "0" * 7 + "1" + "0" * 27])
def test_a_puzzle_with_equal_clues_in_a_row_or_box_has_no_solution(clash):
    assert not list(sudoku.solutions(clash))


def test_larger_sudokus_say_their_size_in_instructions_and_pass_their_verifiers():
    settings = Prompts(size=6, completions=True, style="instruct", holes="6")
    for record in prompts("sudoku", settings, limit=3):
        assert "6x6" in record["prompt"]
        assert "2x3 box" in record["prompt"]
        assert "36 digits" in record["prompt"]
        assert sudoku_units(record).reward == sudoku_verifier(record).reward == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [({"size": 5}, "there are 4, 6, 9"), ({"holes": "13"}, "within 1 and 12")],
)
def test_sudokus_that_are_not_made_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        Prompts(**given)
    assert Prompts(size=6, holes="13").hole_range == (13, 13)


def test_the_same_seed_makes_the_same_prompts_and_none_twice():
    first = list(prompts("sudoku", limit=200, seed=5))
    assert first == list(prompts("sudoku", limit=200, seed=5))
    assert first != list(prompts("sudoku", limit=200, seed=6))
    assert len({r["id"] for r in first}) == 200


def by_python(expression):
    """The exact value of an expression that this package wrote."""
    exact = re.sub(r"\d+", lambda m: f"Fraction({m.group()})", expression)
    return eval(exact, {"Fraction": Fraction})


def operations(expression):
    return len(re.findall(r"[-+*/]", expression))


def test_countdown_solutions_make_their_target_from_each_number_once():
    for problem in islice(countdown.problems("train", (2, 5), seed=1), 300):
        used = map(int, re.findall(r"\d+", problem.solution.text))
        assert sorted(used) == sorted(problem.numbers)
        assert by_python(problem.solution.text) == problem.target
        assert 1 <= problem.target <= 100


@pytest.mark.parametrize(("limit", "enough"), [(288, True), (1000, False)])
def test_more_prompts_than_there_are_are_refused(monkeypatch, limit, enough):
    def records(settings, seed):
        return ({"id": f"mine/{7 * n % 300}", "task": "mine", "prompt": "p"} for n in count())

    module = types.ModuleType("dlmctl.tasks.mine")
    module.records = records
    monkeypatch.setitem(sys.modules, "dlmctl.tasks.mine", module)
    monkeypatch.setattr(sources, "GENERATORS", ("mine",))
    made = prompts("mine", limit=limit)
    if enough:
        assert len({record["id"] for record in made}) == limit
    else:
        with pytest.raises(UsageError, match="mine has 300 different prompts with these options"):
            list(made)


def test_countdown_splits_share_no_problem():
    sides = [
        {(tuple(sorted(p.numbers)), p.target) for p in islice(countdown.problems(s), 500)}
        for s in ("train", "test")
    ]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("source", ["countdown", "arithmetic"])
def test_worked_completions_do_one_operation_a_step_and_keep_the_value(source):
    settings = Prompts(completions=True, worked=True, numbers="2-5")
    for record in prompts(source, settings, limit=300, seed=2):
        chain = (record["prompt"] if source == "arithmetic" else "") + record["completion"]
        sides = chain.split("=")
        assert len({by_python(side) for side in sides}) == 1
        assert [operations(side) for side in sides] == list(range(len(sides)))[::-1]
        assert (gsm8k if source == "arithmetic" else countdown_verifier)(record).reward == 1
        assert source == "arithmetic" or countdown_steps(record).reward == 1


def test_arithmetic_stays_above_zero_and_its_splits_share_no_problem():
    sides = []
    for split in ("train", "test"):
        made = list(prompts("arithmetic", Prompts(split=split, numbers="2-3"), limit=400))
        for record in made:
            terms = re.findall(r"[+-]?\d+", record["prompt"])
            assert sum(map(int, terms)) == record["answer"]
            assert all(sum(map(int, terms[: n + 1])) >= 1 for n in range(len(terms)))
            assert all(10 <= abs(int(term)) <= 99 for term in terms)
        sides.append({tuple(sorted(map(int, re.findall(r"[+-]?\d+", r["prompt"])))) for r in made})
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"worked": True}, "add --completions"),
        ({"worked": True, "completions": True, "style": "instruct"}, "--style plain"),
    ],
)
def test_worked_completions_need_completions_of_plain_prompts(given, said):
    with pytest.raises(UsageError, match=said):
        Prompts(**given)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Puzzle": "1" * 16, "Solution": "1" * 16}, {"task": "sudoku", "prompt": "1" * 16 + "="}),
        (
            {"input": "30,100,93", "output": "23"},
            {"task": "countdown", "numbers": [30, 100, 93], "target": 23},
        ),
        ({"puzzle": "0" * 36}, {"task": "sudoku", "prompt": "0" * 36 + "="}),
        ({"nums": [1, 2], "target": 3}, {"prompt": "1,2:3="}),
        (
            {"question": "q", "answer": "so 4\n#### 1,234"},
            {"task": "gsm8k", "prompt": "q", "answer": "1234"},
        ),
        (
            {"problem": "p", "solution": r"x \boxed{\frac{1}{2}}"},
            {"task": "math", "answer": r"\frac{1}{2}"},
        ),
        (
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": "q"}],
                "reward_model": {"ground_truth": "4"},
            },
            {"task": "gsm8k", "answer": "4", "messages": [{"role": "user", "content": "q"}]},
        ),
        ({"prompt": "p", "extra": 1}, {"prompt": "p", "extra": 1}),
    ],
)
def test_columns_of_other_tools_are_recognised(row, expected):
    record = to_record(Record(row), {}, None, "plain")
    assert {k: record[k] for k in expected} == expected
    assert record["id"]


def test_a_mapped_column_that_is_missing_is_named():
    row = Record(text="x")
    row.where = "f.csv:2"
    with pytest.raises(DataError, match=r"f\.csv:2: there is no column 'question'; there are text"):
        to_record(row, {"prompt": "question"}, None, "plain")
    assert to_record(row, {"prompt": "text"}, None, "plain")["prompt"] == "x"


def test_a_task_is_a_module_and_a_name_in_the_list(monkeypatch):
    def records(settings, seed):
        for number in count(seed):
            yield {"id": f"mine/{number // 2}", "task": "mine", "prompt": settings.style}

    module = types.ModuleType("dlmctl.tasks.mine")
    module.records = records
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sources, "GENERATORS", (*sources.GENERATORS, "mine"))
    made = list(prompts("mine", Prompts(style="instruct"), limit=3, seed=4))
    assert [record["id"] for record in made] == ["mine/2", "mine/3", "mine/4"]
    assert {record["prompt"] for record in made} == {"instruct"}
