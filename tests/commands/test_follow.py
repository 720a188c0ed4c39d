"""Training loops whose prompts are not all sound."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest
from conftest import shell

GOOD = [orjson.dumps({"id": str(n), "prompt": f"{n}+1="}).decode() for n in range(4)]
UNWRITABLE, BROKEN = '{"id": "x", "prompt": "what?"}', '{"id": '
OPTIONS = "--prompts 2 -n 2 --gen-length 4 prompts.jsonl"


def loop(tmp_path: Path, model: str, lines: list[str], on_error: str, rounds: int):
    (tmp_path / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))
    return shell(
        f"dlmctl rollout --follow run -m {model} --rounds {rounds} --on-error {on_error} {OPTIONS}"
        " | jq -c --unbuffered 'if .error then . else . + {reward: .sample} end'"
        f" | dlmctl update -o run --on-error {on_error}",
        tmp_path,
    )


@pytest.mark.parametrize("on_error", ["keep", "skip"])
@pytest.mark.parametrize("bad", [UNWRITABLE, BROKEN])
def test_a_round_does_not_wait_for_the_samples_of_a_prompt_that_has_none(
    tmp_path, saved_models, bad, on_error
):
    done = loop(tmp_path, saved_models("llada"), [GOOD[0], bad, *GOOD[1:3]], on_error, 2)
    assert done.returncode == 0, done.stderr
    seen = [(m["round"], m["completions"]) for m in map(json.loads, done.stdout.splitlines())]
    # A broken line that is skipped is no prompt, and the next takes its place.
    fewer = 4 if (bad, on_error) == (BROKEN, "skip") else 2
    assert seen == [(0, fewer), (1, 4)]


def test_a_round_without_a_sound_prompt_ends_the_loop(tmp_path, saved_models):
    done = loop(tmp_path, saved_models("llada"), [UNWRITABLE] * 2, "keep", 1)
    assert done.returncode
    assert "none of the prompts of round 0 can be used" in done.stderr
