"""Verifiers: what is right is called right, whatever it is wrapped in; and nothing hangs."""

import json

import pytest
from conftest import shell

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.layout import Tags
from dlmctl.settings.verify import Judging
from dlmctl.verifiers.countdown import NotAnExpressionError, evaluate
from dlmctl.verifiers.registry import VERIFIERS, find_verifier, verify


def judge(record, **options):
    [done] = verify([Record(record)], **options)
    return done


# Two solutions: 1 and 2, 3 and 4 can change places.
AMBIGUOUS = {"task": "sudoku", "puzzle": "3040413004000304", "solution": "3241413214232314"}


def test_sudoku_goes_by_the_rules_and_reports_the_stored_cells():
    puzzle, solution = "0031102001033400", "4231132421433412"
    right = judge({"task": "sudoku", "puzzle": puzzle, "completion": solution})
    assert right["reward"] == 1
    wrong = solution[:1] + solution[1:2].replace("2", "1") + solution[2:]
    record = {"task": "sudoku", "puzzle": puzzle, "solution": solution, "completion": wrong}
    verdict = judge(record)["verdict"]["sudoku"]
    assert (verdict["rules"], verdict["stored"], verdict["empty"]) == (False, 7, 8)
    assert "row 1" in verdict["why"]


def test_another_solution_than_the_stored_one_is_right():
    from dlmctl.tasks.sudoku import solutions

    others = list(solutions("3040413004000304"))
    assert len(others) > 1
    for grid in others:
        record = {**AMBIGUOUS, "solution": others[0], "completion": f"<answer>{grid}</answer>"}
        assert judge(record)["reward"] == 1
    assert judge(record, verifiers=["sudoku-cells"])["reward"] < 1


def test_a_grid_that_overwrites_a_clue_is_wrong():
    record = {"task": "sudoku", "puzzle": "1" + "0" * 15, "completion": "4231132421433412"}
    assert judge(record)["verdict"]["sudoku"]["why"] == "a clue was changed"
    assert judge(record, verifiers=["sudoku-units"])["reward"] == 0


def test_a_sudoku_of_six_rows_has_boxes_of_two_rows_and_three_columns():
    grid = "645213213645354126126354432561561432"
    record = {"task": "sudoku", "puzzle": "6" + "0" * 35, "completion": f"so {grid} it is"}
    assert judge(record)["reward"] == judge(record, verifiers=["sudoku-units"])["reward"] == 1
    # Every row shifts the one above by one: rows and columns are right, the six boxes are not.
    latin = "".join("123456"[row:] + "123456"[:row] for row in range(6))
    record = {"task": "sudoku", "puzzle": "0" * 36, "completion": latin}
    assert judge(record)["verdict"]["sudoku"]["why"] == "box 1 does not hold 1 to 6"
    assert judge(record, verifiers=["sudoku-units"])["reward"] == 12 / 18
    with pytest.raises(DataError, match="not 16 digits up to 4, 36 up to 6 or 81 up to 9"):
        judge({"task": "sudoku", "puzzle": "7" + "0" * 35, "completion": grid})


@pytest.mark.parametrize(
    ("completion", "parts", "right"),
    [
        ("(95+75)/85=170/85=2", 4, True),
        ("(95+75)/85", 1, True),
        ("(95+75)/85=170/84=2", 2, True),
        ("(95+75)/85=2", 1, True),
        ("(95+75)/85=170/85=2=2", 0, True),
        ("95+85+75=180+75=255", 3, False),
        ("95+85+75=180+75=2", 3, False),
        ("1+1+1=2+1=3", 2, False),
        ("95+85=180=170+10=2", 0, False),
        ("2=2=2", 2, False),
        ("=", 0, False),
    ],
)
def test_countdown_steps_counts_what_is_right_of_the_working(completion, parts, right):
    record = {"task": "countdown", "numbers": [95, 85, 75], "target": 2, "completion": completion}
    judged = judge(record, verifiers=["countdown-steps"])
    assert judged["reward"] == parts / 4
    assert judged["verdict"]["countdown-steps"]["correct"] == right


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("95+75)/85", False),
        ("(95+75)/85", True),
        (r"<answer>\boxed{(95 + 75) \div 85 = 2}</answer>", True),
        (r"<answer>\frac{95+75}{85}</answer>", True),
        (r"<answer>\( (75 + 95) / 85 \)</answer><|eot_id|> junk 1+1", True),
        ("95+75", False),
        ("(95+75)/85+0*85", False),
        ("__import__('os').getcwd()", False),
        ("", False),
    ],
)
def test_countdown_reads_expressions(completion, right):
    record = {"task": "countdown", "numbers": [95, 85, 75], "target": 2, "completion": completion}
    assert judge(record)["reward"] == right


@pytest.mark.parametrize(
    "text",
    ["90**43**90", "-1+2", "1//2", "1_0+1", "1.5+1", "a+1", "1/0", "(" * 5000, "1" * 300],
)
def test_what_is_no_arithmetic_is_refused_at_once(text):
    with pytest.raises(NotAnExpressionError):
        evaluate(text)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (r"\boxed{1,234}", True),
        ("<answer>$1234.00 dollars</answer>", True),
        (r"so 5 + 1229 = 1234", True),
        ("<answer>\n\\boxed{}1234\n</answer>", True),
        ("#### 1234", True),
        (r"<answer>\boxed{1234\text{ cups}}</answer>", True),
        ("<answer>1235</answer>", False),
        ("none", False),
    ],
)
def test_gsm8k_reads_numbers(completion, right):
    assert judge({"task": "gsm8k", "answer": "1234", "completion": completion})["reward"] == right


def test_math_compares_by_value():
    def reward(text, answer):
        return judge({"task": "math500", "answer": answer, "completion": text})["reward"]

    assert reward(r"<answer>\boxed{0.5}</answer>", r"\frac{1}{2}") == 1
    assert reward(r"\boxed{\frac{3}{6}}", r"\frac12") == 1
    assert reward(r"\boxed{x+1}", "x+2") == 0


def test_rewards_are_summed_with_their_weights():
    record = {"task": "exact", "answer": "A", "completion": "<answer>A</answer>"}
    done = judge(
        record, verifiers=["exact", "choice", "format"], judging=Judging(weight=["choice=0.5"])
    )
    assert done["rewards"] == {"exact": 1, "choice": 1, "format": 0}
    assert done["reward"] == 1.5


def test_the_preset_of_d1_sums_its_parts():
    text = "<reasoning>\nx\n</reasoning>\n<answer>\n4\n</answer>\n"
    done = judge({"task": "gsm8k", "answer": "4", "completion": text}, judging=Judging(preset="d1"))
    assert done["reward"] == pytest.approx(2 + 0.5 + 0.5 + 0.5 + 0.5)
    wrong = {
        "task": "countdown",
        "numbers": [1, 2],
        "target": 3,
        "completion": "<answer>1</answer>",
    }
    assert judge(wrong, judging=Judging(preset="d1"))["reward"] == 0.1


def test_evaluation_files_of_d1_are_read_as_they_are():
    row = {"task": "countdown", "question": "q", "ground_truth": [[1, 2], 3], "d1_score": 0}
    assert judge({**row, "generation": "</reasoning><answer>1+2</answer>"})["reward"] == 1
    assert judge({**row, "generations": "</reasoning><answer>1+2</answer>"})["reward"] == 1
    nothing = {"task": "gsm8k", "ground_truth": None, "generation": "4"}
    assert "no ground truth" in judge(nothing)["verdict"]["gsm8k"]["why"]


def test_what_cannot_be_judged_is_said():
    with pytest.raises(DataError, match="no verifier for task 'poetry'"):
        judge({"task": "poetry", "completion": "x"})
    with pytest.raises(DataError, match="'completion' is missing"):
        judge({"task": "gsm8k", "answer": "1"})
    with pytest.raises(UsageError, match="no verifier 'poem'"):
        judge({"completion": "x"}, verifiers=["poem"])


def test_own_functions_and_programs_judge_too(tmp_path):
    (tmp_path / "mine.py").write_text("def short(record): return 0.25, {'why': 'short'}")
    (tmp_path / "check.py").write_text(
        "import sys\nfor line in sys.stdin: print(len(line) > 0, flush=True) if 0 else "
        "print('{\"reward\": 0.5}', flush=True)"
    )
    line = 'yes \'{"completion": "x"}\' | dlmctl verify'
    done = shell(f"{line} --verifier mine:short --exec 'python check.py' | head -2", tmp_path)
    records = [json.loads(x) for x in done.stdout.splitlines()]
    assert [r["reward"] for r in records] == [0.75, 0.75]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("program", "limit", "message"),
    [
        ("false", 600, "ended"),
        ("sleep 1000", 0.5, "no verdict within"),
        ("yes maybe", 600, "not JSON"),
    ],
)
def test_a_program_that_gives_no_verdict_is_named(tmp_path, program, limit, message):
    line = f"dlmctl verify --exec '{program}' --time-limit {limit}"
    done = shell(f'{line} <<< \'{{"completion": "x"}}\'', tmp_path)
    assert done.returncode == 65
    assert "<stdin>:1" in done.stderr
    assert message in done.stderr


def takes(record, time_limit, tags, unconfined):
    return 1.0, {"time_limit": time_limit, "tags": tags.perception, "unconfined": unconfined}


def test_a_verifier_is_a_function_and_a_line_of_the_table(monkeypatch):
    """It receives the settings that it has parameters for."""
    monkeypatch.setitem(VERIFIERS, "takes", f"{__name__}:takes")
    find_verifier.cache_clear()
    settings = Judging(time_limit=3.0, allow_unconfined=True)
    done = judge({"completion": "x"}, verifiers=["takes"], judging=settings, tags=Tags("see"))
    assert done["reward"] == 1
    assert done["verdict"]["takes"] == {"time_limit": 3.0, "tags": "see", "unconfined": True}
    assert judge({"task": "takes", "completion": "x"})["rewards"] == {"takes": 1}
