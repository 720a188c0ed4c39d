"""The command line as a whole: the table, versions, exit codes, start-up."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import invoke, shell
from typer.testing import CliRunner

from dlmctl import __version__
from dlmctl.cli import FORMER, SUBCOMMANDS, app, functions


def test_the_version_is_shown():
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.strip() == f"dlmctl {__version__}"


def test_help_lists_every_subcommand_with_its_summary():
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout
    for name, row in SUBCOMMANDS.items():
        assert name in text
        assert row.summary in text


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_works_and_says_so_but_is_not_listed(name):
    assert name not in CliRunner().invoke(app, ["--help"]).stdout
    said = CliRunner().invoke(app, [name, "--help"]).stdout
    assert "Former name of" in said
    assert "--tuned" in said


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_a_help_screen(name):
    for flag in ("-h", "--help"):
        result = CliRunner().invoke(app, [name, flag], env={"COLUMNS": "100"})
        assert result.exit_code == 0
        assert SUBCOMMANDS[name].summary in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_of_a_command_fits_a_terminal_of_80_with_every_name_whole(name):
    for full, function in functions(name).items():
        group, *rest = full.split()
        said = CliRunner().invoke(app, [group, *rest, "--help"], env={"COLUMNS": "80"}).stdout
        assert max(map(len, said.splitlines())) <= 80, full
        for option in re.findall(r"--[a-z][a-z0-9-]+", inspect.getsource(inspect.unwrap(function))):
            assert re.search(rf"(^|\W){option}(?![a-z-])", said), (full, option)


def test_a_wrong_name_is_answered_by_those_that_are_like_it():
    assert "Did you mean 'rollout'" in CliRunner().invoke(app, ["rolout"]).stderr


@pytest.mark.parametrize(
    "line", ["--help", "rollout --help", "prompts sudoku -n 2", "verify", "stats"]
)
def test_the_upper_floor_does_not_import_torch(line):
    code = (
        "import sys; from dlmctl.cli import main\n"
        f"sys.argv = ['dlmctl', *{line.split()!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_subcommand_or_option_is_a_usage_error():
    assert CliRunner().invoke(app, ["rolout"]).exit_code == 2
    assert CliRunner().invoke(app, ["rollout", "--tempreature", "1"]).exit_code == 2


def test_options_are_read_from_the_environment(tmp_path):
    done = shell("DLMCTL_ON_ERROR=skip dlmctl verify <<< 'nonsense'", tmp_path)
    assert done.returncode == 0
    assert "<stdin>:1" in done.stderr


def test_a_record_that_ends_a_stage_comes_with_what_goes_on_without_it(tmp_path):
    good = '{"task": "gsm8k", "id": "a", "prompt": "1+1", "answer": "2", "completion": "2"}'
    bad = good.replace('"2"', "null", 1)
    lines, hint = tmp_path / "lines.jsonl", "; --on-error skip continues without it\n"
    lines.write_text(f"{good}\n{bad}\n{good}\n")
    done = invoke("verify", lines)
    assert (done.exit_code, done.stdout.count("\n")) == (65, 1)
    assert done.stderr.startswith(f"dlmctl: {lines}:2: field 'answer' is missing")
    assert done.stderr.endswith(hint)
    for choice, count in (("skip", 2), ("keep", 3)):
        done = invoke("verify", lines, "--on-error", choice)
        assert (done.exit_code, done.stdout.count("\n")) == (0, count)
        assert hint.strip() not in done.stderr + done.stdout
    lines.write_text(f"{good}\nnonsense\n")
    for command in (["verify"], ["stats"], ["plot"], ["rollout", "-n", "1"]):
        done = invoke(*command, lines)
        assert (done.exit_code, f"{lines}:2: not JSON" in done.stderr) == (65, True)
        assert done.stderr.endswith(hint)


@pytest.mark.parametrize("line", ["bench rollout -m builtin:puzzles", "update --algo sft"])
def test_where_nothing_can_be_skipped_that_is_not_said(tmp_path, line):
    (tmp_path / "lines.jsonl").write_text('{"id": "a"}\n')
    done = shell(f"dlmctl {line} lines.jsonl", tmp_path)
    assert done.returncode == 65
    assert "--on-error" not in done.stderr


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_shell_completion_knows_the_subcommands(tmp_path, name):
    done = shell(f"_DLMCTL_COMPLETE=source_{name} dlmctl", tmp_path)
    assert "dlmctl" in done.stdout
    variables = "_DLMCTL_COMPLETE=complete_bash COMP_WORDS='dlmctl rol' COMP_CWORD=1"
    assert "rollout" in shell(f"{variables} dlmctl", tmp_path).stdout


def test_the_package_runs_as_a_module(tmp_path):
    done = shell(f"{sys.executable} -m dlmctl --version", tmp_path)
    assert done.stdout.strip() == f"dlmctl {__version__}"


def test_doctor_says_what_there_is(tmp_path):
    done = shell("dlmctl doctor", tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"torch"' in done.stdout
    assert '"builtin:puzzles"' in done.stdout


def test_doctor_names_the_command_that_installs_what_is_missing(monkeypatch):
    import importlib.util

    from dlmctl.report import diagnosis

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a)
    )
    [finding] = [f for f in diagnosis.findings() if f.name == "peft"]
    assert finding.state == "missing"
    assert "pip install 'dlmctl[lora]'" in finding.detail


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bfloat16 in hardware (AMX, AVX512-BF16): "),
        ({"amx_bf16": False, "avx512_bf16": True}, "bfloat16 in hardware (AVX512-BF16): "),
        ({"amx_tile": True, "avx512_f": True}, "no bfloat16 in hardware"),
    ],
)
def test_doctor_says_whether_the_processor_computes_in_bfloat16(able, expected, monkeypatch):
    import torch

    from dlmctl.report import diagnosis

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    [finding] = [f for f in diagnosis.findings() if f.name == "cpu"]
    assert (finding.state, finding.detail.startswith(expected)) == ("ok", True)
    # Older versions of torch do not say.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert "cpu" not in [f.name for f in diagnosis.findings()]


def test_no_module_of_the_package_is_long():
    root = Path(__file__).parents[2] / "dlmctl"
    long = [p.name for p in root.rglob("*.py") if len(p.read_text().splitlines()) > 400]
    assert not long
