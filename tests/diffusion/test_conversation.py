"""`chat`: answers are those of `rollout`, and in the end the screen has them."""

from __future__ import annotations

import io
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import orjson
import pytest
from conftest import invoke, tiny_policy
from rich.cells import cell_len
from rich.text import Text

from dlmctl.diffusion import drawing
from dlmctl.diffusion.conversation import Conversation
from dlmctl.diffusion.drawing import MASK, Drawing, Spelling, VisibleCursor, for_terminal, wrapped
from dlmctl.models.policy import Policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import bpe_tokenizer, byte_tokenizer
from dlmctl.records.errors import DataError, UsageError
from dlmctl.settings.sampler import SAMPLED, Sampler, changed
from dlmctl.settings.small import SmallModel

ORDERS = [
    "--temperature 0",
    "--remasking random --seed 3",
    "--remasking entropy --top-p 0.8",
    "--remasking margin --steps 4 --seed 7",
    "--threshold 0.3 --eos late",
]
OF_DREAM = ["--schedule timesteps --alg-temp 0.5", "--block-length 4 --cache dual"]
OF_BLOCKS = ["--edit-threshold 0.2 --edit-steps 3", "--sub-block-length 2"]
CASES = [
    *itertools.product(["llada"], [*ORDERS, "--cfg-scale 1"]),
    *itertools.product(["dream"], [*ORDERS, *OF_DREAM]),
    *itertools.product(["sdar"], [*ORDERS, *OF_BLOCKS]),
    *itertools.product(["ar"], ["--temperature 0", "--seed 5", "--top-k 3 --temperature 2"]),
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
STRANGE = "a é 中文字 🙂 한\u0301 \x1b[31m\u009b\x07\u202e\r\n\t x" * 4


def policy_of(family: str, length: int = 24, size: int = 300, **more: int) -> Policy:
    """A model whose tokens are parts of words and of characters."""
    tokenizer = bpe_tokenizer([STRANGE], size) if size else byte_tokenizer()
    return make_policy(SmallModel(family, 16, 2, 2, gen_length=length, **more), tokenizer, seed=2)


class Screen(io.StringIO):
    """A terminal: rows that have scrolled away, and those that can still be written.

    It knows the codes that `rich` uses for a live display, and takes no other.
    """

    CODE = re.compile(r"\x1b\[([\d;]*)([A-Za-z])")

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows, self.row, self.used = [""], 0, 0
        self.seen: list[str] = []
        """The screen after each write."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                code = self.CODE.match(text, place)
                assert code, repr(text[place : place + 10])
                self._obey(*code.groups())
                place = code.end()
            else:
                self._put(text[place])
                place += 1
        self.seen.append("\n".join(self.rows))
        return len(text)

    def _obey(self, numbers: str, letter: str) -> None:
        if letter == "A":
            self.row -= int(numbers or 1)
            assert self.row >= max(0, len(self.rows) - self.height), "above the screen"
        elif (numbers, letter) == ("2", "K"):
            self.rows[self.row], self.used = "", 0
        else:
            assert letter == "m", (numbers, letter)

    def _put(self, char: str) -> None:
        if char == "\n":
            self.row, self.used = self.row + 1, 0
            self.rows += [""] * (self.row == len(self.rows))
        elif char == "\r":
            self.used = 0
        else:
            assert char.isprintable() or char in drawing.JOINERS, repr(char)
            self.used += cell_len(char)
            assert self.used <= self.width
            self.rows[self.row] += char


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "FRAME_S", 0.0)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


def drawn(talk: Conversation, prompt: str, width: int = 20, height: int = 9) -> Screen:
    """The screen after an answer."""
    screen = Screen(width, height)
    console = VisibleCursor(
        file=screen, force_terminal=True, width=width, height=height, color_system="256"
    )
    picture = Drawing(console, Spelling(talk.policy), talk.policy, talk.config)
    picture.show(lambda callback: talk.ask(prompt, callback))
    return screen


@pytest.mark.parametrize(("family", "options"), CASES)
def test_an_answer_is_the_record_of_rollout(saved_models, tmp_path, family, options):
    words = ["-m", saved_models(family)]
    prompt = "0031102001033400="
    (tmp_path / "p").write_bytes(orjson.dumps({"id": "turn-1", "prompt": prompt}))
    done = invoke("rollout", tmp_path / "p", *words, "-n", 1, *options.split())
    assert done.exit_code == 0, done.stderr
    said = invoke("chat", words[1], prompt, "--once", "--json", *options.split())
    assert said.stdout == done.stdout
    text = invoke("chat", words[1], prompt, "--once", *options.split()).stdout
    assert text == orjson.loads(done.stdout)["completion"] + "\n"


@pytest.mark.parametrize(("family", "options"), CASES)
def test_to_draw_an_answer_does_not_change_it(family, options):
    policy = tiny_policy(family)
    given = {flag.strip().split()[0]: flag.split()[1] for flag in options.split("--") if flag}
    seed = int(given.pop("seed", 0))
    # All at once, as on the command line: one alone may contradict a default.
    fields = {name.replace("-", "_"): (name, text) for name, text in given.items()}
    values = {field: getattr(changed(SAMPLED, *pair), field) for field, pair in fields.items()}
    sampler = replace(SAMPLED, **values)
    quiet, shown = (Conversation(policy, sampler, seed) for _ in range(2))
    screen = drawn(shown, "01=")
    assert shown.records == [quiet.ask("01=")]
    assert any(screen.rows)


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "ar"])
@pytest.mark.parametrize("size", [0, 300])
def test_the_screen_has_the_answer_in_the_end_also_if_it_is_longer(family, size):
    blocks = {"block_length": 8} if family == "sdar" else {}
    sampler = replace(SAMPLED, eos="never")  # of no meaning to "ar", which does not end so early
    talk = Conversation(policy_of(family, 160, size, **blocks), sampler, 1)
    screen = drawn(talk, "a")
    [record] = talk.records
    # Some of what a random model says is for a terminal to obey, and is no whole character.
    assert any(ord(c) < 32 or c == "\ufffd" for c in record["completion"])
    lines = [line.plain for line in wrapped(Text(for_terminal(record["completion"])), 20)]
    assert screen.rows[: len(lines)] == lines
    figures = " ".join(screen.rows[len(lines) :])
    assert figures.startswith(f"{record['rollout']['length']} tokens, ")
    assert len(lines) > screen.height
    frames = [frame for frame in screen.seen if " of 160 tokens" in frame]
    assert len(frames) >= record["rollout"]["nfe"] - 1


def test_tokens_appear_in_the_order_in_which_they_are_decided():
    talk = Conversation(tiny_policy(), Sampler(temperature=1.0, steps=6), 0)
    screen = drawn(talk, "01=", 40)
    [record] = talk.records
    order, text = record["rollout"]["order"], record["completion"]
    assert sorted(order) == list(range(6))
    assert len(text) == 6, "a token that ends it was sampled: take another seed"
    frames = [
        "".join(char if step < now else MASK for char, step in zip(text, order, strict=True))
        + f"\n{now} of 6 tokens"
        for now in range(6)
    ]
    seen = [frame for frame, _ in itertools.groupby(screen.seen)]
    assert [frame for frame in seen if "of 6 tokens" in frame] == frames


def pieces(generator: random.Random, count: int) -> str:
    words = [
        "a",
        "of",
        "longer",
        "incomprehensibilities",
        "中",
        "文。",
        " ",
        "  ",
        "\n",
        MASK,
        "é.",
    ]
    return "".join(generator.choice(words) for _ in range(count))


def test_a_text_that_grows_keeps_its_lines_but_the_last():
    generator = random.Random(0)
    for _ in range(60):
        width, text = generator.randint(4, 24), pieces(generator, 30)
        lines = [line.plain for line in wrapped(Text(text), width)]
        assert max(map(cell_len, lines)) <= width
        assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", text)
        for end in range(len(text)):
            begun = [line.plain for line in wrapped(Text(text[:end]), width)]
            assert begun[:-1] == lines[: len(begun) - 1]


def test_characters_of_which_tokens_are_missing_are_masked_and_never_fixed():
    """The parts of any state of a text, in any order of decision, against the whole text."""
    policy, generator = policy_of("llada", size=0), random.Random(1)
    spelling, text = Spelling(policy), "né 中文🙂!"
    tokens = policy.encode_text(text)
    whole, _ = spelling.parts(tokens, [0] * len(tokens), len(tokens), final=True)
    assert "".join(part.text for part in whole) == text
    for share in (0.3, 0.6, 0.9):
        for _ in range(100):
            order = [0 if generator.random() < share else None for _ in tokens]
            parts, still = spelling.parts(tokens, order, len(tokens))
            assert len(parts) == len(tokens)
            assert parts[:still] == whole[:still]
            assert None not in order[:still]
            shown = "".join(part.text for part in parts)
            assert "\ufffd" not in shown
            assert set(shown) <= {*text, MASK}


def test_an_end_of_sequence_ends_the_picture_and_special_tokens_are_left_out():
    policy = tiny_policy()
    one, end, pad = policy.encode_text("1")[0], policy.eos_id, policy.pad_id
    parts, still = Spelling(policy).parts([one, pad, 0, end, one], [0, 1, None, 2, None], 5)
    assert [part.text for part in parts] == ["1", MASK]
    assert still == 1
    assert Spelling(policy).parts([one, one], [0, 0], 1)[1] == 1  # the other may be edited


def test_with_a_template_each_prompt_has_the_turns_before_it():
    policy = policy_of("llada")
    policy.tokenizer.chat_template = TEMPLATE
    talk = Conversation(policy, SAMPLED, 0, system="be")
    first, second = talk.ask("one"), talk.ask("two")
    roles = ["system", "user", "assistant", "user"]
    assert [message["role"] for message in second["messages"]] == roles
    assert second["messages"][2]["content"] == first["completion"]
    asked = policy.tokenizer.decode(second["tokens"]["prompt"])
    assert asked == f"s:be;u:one;a:{first['completion']};u:two;a:"
    talk.reset()
    assert len(talk.ask("three")["messages"]) == 2
    assert [record["id"] for record in talk.records] == ["turn-1", "turn-2", "turn-3"]


def test_a_turn_that_fails_or_is_interrupted_leaves_no_trace():
    policy = policy_of("llada")
    policy.tokenizer.chat_template = TEMPLATE
    talk = Conversation(policy, SAMPLED, 0)

    class Stop(drawing.SamplerCallback):
        def on_rows(self, requests: Sequence[int]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("one", Stop())
    assert len(talk.ask("two")["messages"]) == 1
    with pytest.raises(DataError, match="no tokens"):
        Conversation(tiny_policy(), SAMPLED, 0).ask("letters")


def test_what_contradicts_is_refused_and_changes_nothing():
    talk = Conversation(tiny_policy(), SAMPLED, 0)
    before = talk.config
    for sampler in (Sampler(steps=1, block_length=2), Sampler(remasking="sae")):
        with pytest.raises(UsageError):
            talk.use(sampler)
    assert (talk.sampler, talk.config) == (SAMPLED, before)
    with pytest.raises(UsageError, match="--system"):
        Conversation(tiny_policy(), SAMPLED, 0, system="be")


def test_options_are_changed_by_their_names():
    sampler = changed(changed(SAMPLED, "steps", "8"), "--gen-length", "16")
    assert sampler == Sampler(temperature=1.0, steps=8, gen_length=16)
    assert changed(changed(sampler, "gen_length", ""), "steps", "") == SAMPLED
    assert changed(changed(SAMPLED, "temperature", "0.5"), "temperature", "") == SAMPLED
    assert changed(SAMPLED, "early-stop", "true").early_stop is True
    assert changed(SAMPLED, "remasking", "entropy").remasking == "entropy"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("step", "3", "no option step; there are gen-length"),
        ("steps", "0", "--steps 0: it is a whole number, at least 1"),
        ("steps", "1.5", "a whole number"),
        ("temperature", "nan", "a number, at least 0"),
        ("top-p", "2", "at least 0 and at most 1"),
        ("early-stop", "1", "one of true, false"),
        ("remasking", "best", "one of low_confidence, random"),
    ],
)
def test_a_value_out_of_bounds_is_answered_by_what_there_is(name, text, said):
    with pytest.raises(UsageError, match=said):
        changed(SAMPLED, name, text)
