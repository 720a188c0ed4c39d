"""Settings classes become options of the command line, and come back filled in."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from dlmctl.cli import SUBCOMMANDS, functions
from dlmctl.options import with_options
from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, Shown, Without, knob, knob_of, same_field
from dlmctl.settings.models import Prompting, Reading, split_name


@dataclass(frozen=True)
class Sizes:
    width: int = knob(3, "How wide it is.", minimum=1, maximum=9, panel="Sizes", env=True)
    kind: Literal["round", "square"] | None = knob(None, "Its form.", shown_default="round")
    bare: bool = knob(True, "Without anything.", "--bare/--dressed")


def run(*arguments: str, environment: dict[str, str] | None = None):
    seen: list[tuple[str, Sizes]] = []

    def command(name: Annotated[str, typer.Argument()] = "x", sizes: Sizes = Sizes()) -> None:
        """Do nothing."""
        seen.append((name, sizes))

    app = typer.Typer()
    app.command()(with_options(command))
    result = CliRunner().invoke(app, arguments, env=environment)
    return result, seen


def test_a_command_receives_its_settings_filled_in():
    assert run()[1] == [("x", Sizes(3, None, True))]
    arguments = ["y", "--width", "4", "--kind", "square", "--dressed"]
    assert run(*arguments)[1] == [("y", Sizes(4, "square", False))]
    assert run(environment={"DLMCTL_WIDTH": "5"})[1] == [("x", Sizes(5))]


@pytest.mark.parametrize("arguments", [["--width", "0"], ["--width", "10"], ["--kind", "flat"]])
def test_values_out_of_bounds_do_not_reach_it(arguments):
    result, seen = run(*arguments)
    assert result.exit_code == 2
    assert not seen


def test_a_knob_within_an_optional_as_python_3_10_has_it_is_an_option():
    seen: list[int | None] = []

    def command(size: Annotated[int | None, Knob("Its size.", "-s")] | None = None) -> None:
        """Do nothing."""
        seen.append(size)

    app = typer.Typer()
    app.command()(with_options(command))
    assert CliRunner().invoke(app, ["-s", "4"]).exit_code == 0
    assert seen == [4]


def test_help_says_what_the_fields_say():
    shown = " ".join(run("--help")[0].output.split())
    for text in ("How wide it is.", "Its form.", "(round)", "--dressed", "DLMCTL_WIDTH", "Sizes"):
        assert text in shown


def test_a_default_of_the_parameter_is_that_of_the_options():
    seen = []

    def command(
        sizes: Annotated[Sizes, Shown(kind="oval")] = Sizes(width=5),
        name: Annotated[str, Knob("Its name.", "-N", "--called", env=True)] = "x",
    ) -> None:
        seen.append((name, sizes))

    app = typer.Typer()
    app.command()(with_options(command))
    run = CliRunner().invoke
    assert run(app, []).exit_code == 0
    assert run(app, ["-N", "y"], env={"DLMCTL_CALLED": "z"}).exit_code == 0
    assert run(app, [], env={"DLMCTL_CALLED": "z"}).exit_code == 0
    assert seen == [("x", Sizes(5)), ("y", Sizes(5)), ("z", Sizes(5))]
    shown = " ".join(run(app, ["--help"]).output.split())
    assert "(oval)" in shown
    assert "(round)" not in shown


def test_a_field_that_is_left_out_has_no_option_and_keeps_its_default():
    seen = []

    def command(sizes: Annotated[Sizes, Without("width")] = Sizes(width=5)) -> None:
        seen.append(sizes)

    app = typer.Typer()
    app.command()(with_options(command))
    run = CliRunner().invoke
    assert run(app, ["--kind", "square"]).exit_code == 0
    assert seen == [Sizes(5, "square")]
    assert run(app, ["--width", "4"]).exit_code == 2


def test_fields_stand_under_the_heading_of_their_class_unless_they_have_their_own():
    @dataclass(frozen=True)
    class Parts:
        PANEL: ClassVar[str] = "Parts"

        first_part: int = knob(1, "The first.")
        second: int = knob(2, "The second.", panel="Elsewhere")
        copied: int | None = same_field(None, Sizes, "width")

    panels = {field.name: knob_of(field, Parts).panel for field in dataclasses.fields(Parts)}
    assert panels == {"first_part": "Parts", "second": "Elsewhere", "copied": "Sizes"}
    assert knob_of(dataclasses.fields(Parts)[0], Parts).flag("first_part") == "--first-part"


def test_two_fields_of_one_name_are_an_error():
    def command(sizes: Sizes = Sizes(), width: int = 1) -> None: ...

    with pytest.raises(TypeError, match="one name"):
        with_options(command)


def test_a_knob_has_only_what_it_can_say():
    with pytest.raises(TypeError, match="minumum"):
        knob(1, "x", minumum=0)


def test_every_field_of_the_settings_is_an_option_of_the_commands_that_take_them():
    parameters = inspect.signature(functions("rollout")["rollout"]).parameters
    for kind in (Reading, Prompting):
        for field in dataclasses.fields(kind):
            if (
                kind is Reading and field.name == "block_length"
            ):  # it follows the model's name alone
                continue
            assert knob_of(field, kind).help
            assert parameters[field.name].default == field.default
    taking = {n for n in SUBCOMMANDS for f in functions(n).values() if "family" in _names(f)}
    assert {"rollout", "score-elbo", "update", "sae-train", "distill", "memo-eval"} <= taking


def _names(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", Reading())),
        ("a/b@main,family=a2d", ("a/b@main", Reading("a2d"))),
        ("x,mask_id=7,shift=0,family=ar", ("x", Reading("ar", 0, 7))),
        ("x,family=ar,family=a2d", ("x", Reading("a2d"))),
        ("a,b=c", ("a,b=c", Reading())),
        ("a,b=c,shift=1", ("a,b=c", Reading(shift=1))),
        ("a,family", ("a,family", Reading())),
    ],
)
def test_settings_stand_behind_the_name_of_a_model(name, expected):
    assert split_name(name) == expected
    plain, reading = expected
    assert split_name(reading.name(plain)) == expected


def test_settings_of_a_model_need_one():
    assert Reading().of(None) is None
    assert Reading("a2d").of("x") == "x,family=a2d"
    with pytest.raises(UsageError, match="give it too"):
        Reading("a2d").of(None)


def test_a_preset_decides_the_defaults_of_other_options_only():
    seen = []

    def command(
        sizes: Sizes = Sizes(),
        form: Annotated[str, Knob("Its form.", presets={"big": {"width": 8}, "usual": {}})] = (
            "usual"
        ),
    ) -> None:
        seen.append(sizes.width)

    app = typer.Typer()
    app.command()(with_options(command))
    for arguments in ([], ["--form", "big"], ["--width", "2", "--form", "big"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    CliRunner().invoke(app, ["--form", "big"], env={"DLMCTL_WIDTH": "4"})
    assert seen == [3, 8, 2, 4]
