"""Conversations in a terminal (`dlmctl chat`), whose answers are those that `rollout` samples.

An answer is a record that `rollout` makes of the conversation so far, and nothing else: the record
that /save writes, given to `rollout` with the same options, is completed in the same way.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from rich.text import Text

from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.drawing import COLOURS, MASK, Drawing, Spelling, VisibleCursor, for_terminal
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.models.policy import Policy
from dlmctl.records import interrupts
from dlmctl.records.errors import DataError, UsageError, UserFacingError
from dlmctl.records.jsonl import Record, write_records
from dlmctl.settings.sampler import Sampler, changed

HELP = {
    "/set NAME VALUE": "change an option of the sampler, as --NAME VALUE does; without VALUE to "
    "its default; /set alone says what is set",
    "/reset": "forget the conversation",
    "/save FILE": "write all answers so far as records of rollout, which verify and view read",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}
"""Commands within a conversation."""


class Conversation:
    """Turns of a user and a model; with a chat template each prompt has all turns before it."""

    def __init__(
        self, policy: Policy, sampler: Sampler, seed: int, system: str | None = None
    ) -> None:
        """Raises UsageError: the options do not go with the model."""
        self.policy, self._seed, self._system = policy, seed, system
        self.remembers = policy.tokenizer.chat_template is not None and policy.prompting.chat
        if system is not None and not self.remembers:
            raise UsageError(
                f"--system is a message for the chat template, and {policy.name} is prompted "
                "without one: leave it out"
            )
        self.records: list[Record] = []
        """All answers, those before /reset included."""
        self._asked = 0
        self.use(sampler)
        self.reset()

    def use(self, sampler: Sampler) -> None:
        """Sample with these options from now on; raises UsageError, and then nothing changes."""
        if sampler.remasking == "sae":
            raise UsageError("--remasking sae goes by an autoencoder, which only 'rollout' takes")
        self.config = configured(self.policy, sampler)
        self.sampler = sampler

    def reset(self) -> None:
        """Forget all turns."""
        self._messages = []
        if self._system is not None:
            self._messages = [{"role": "system", "content": self._system}]

    def ask(self, text: str, callback: SamplerCallback | None = None) -> Record:
        """The answer, as `rollout` writes it; a turn that raises leaves no trace."""
        self._asked += 1  # the noise depends on the id: the same question gets another answer
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = {"messages": messages} if self.remembers else {"prompt": text}
        request = Record({"id": f"turn-{self._asked}", **prompt})
        [record] = rollout([request], self.policy, self.config, 1, self._seed, 1, callback=callback)
        self.records.append(record)
        self._messages = [*messages, {"role": "assistant", "content": self.answer(record)}]
        return record

    def answer(self, record: Record) -> str:
        """The text of an answer, which --prefill began."""
        return self.policy.prompting.prefill + str(record["completion"])


class Session:
    """A conversation that is read from standard input and written to standard output."""

    def __init__(self, talk: Conversation, draws: bool, least: float = 0.0) -> None:
        """Args:
        draws: whether answers are drawn, on a terminal with ANSI codes; else they are written.
        least: seconds that each step is shown at least.
        """
        self._talk, self._least = talk, least
        self._typed = sys.stdin.isatty()
        self._console = VisibleCursor(highlight=False) if draws else None
        self._spelling = Spelling(talk.policy)
        self._saved: set[Path] = set()

    def run(self, first: str | None = None) -> None:
        """Answer until the end of the input or /quit; `first` is the first line, if it is given.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed twice, with no line between.
            UserFacingError: a line cannot be answered, and nobody is there to type another.
        """
        if self._typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (with it, `input` edits lines)
            interrupts.hand_over()
            self._greet()
        stopped = False
        while True:
            try:
                line, first = self._read() if first is None else first, None
                if line is None or not self._do(line):
                    return
                stopped = False
            except KeyboardInterrupt:
                if stopped:
                    self._say("")
                    raise
                stopped = True
                self._say("\ninterrupted; Ctrl-C again, or Ctrl-D, ends")
            except UserFacingError as error:
                if not self._typed:
                    raise
                print(f"dlmctl: {for_terminal(str(error))}", file=sys.stderr)
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError" or not self._typed:
                    raise
                said = "the device has not enough memory: /reset, or /set a smaller gen-length"
                print(f"dlmctl: {said}", file=sys.stderr)

    def _read(self) -> str | None:
        """The next line; None at the end."""
        try:
            line = input("> " if self._typed and sys.stdout.isatty() else "")
            line.encode()  # in some locales, what is not UTF-8 is read as surrogates
            return line
        except EOFError:
            self._say("")
            return None
        except UnicodeError:
            raise DataError("it is not UTF-8", "<stdin>") from None

    def _do(self, line: str) -> bool:
        """Answer a prompt or follow a command; returns whether the conversation goes on."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line[line.startswith("//") :])
            return True
        command, *rest = line.replace("=", " ").split(None, 2)
        if command == "/quit":
            return False
        if command == "/reset":
            self._talk.reset()
            self._say("The conversation is forgotten.")
        elif command == "/set":
            if rest:
                value = " ".join(rest[1:]).strip()
                self._talk.use(changed(self._talk.sampler, rest[0], value))
            self._say(self._options())
        elif command == "/save" and rest:
            self._save(Path(line.split(None, 1)[1].strip()).expanduser())
        elif command == "/help":
            for form, meaning in HELP.items():
                self._say(f"{form}: {meaning}")
            self._say("A prompt that begins with / is written with //.")
        else:
            needs = "needs a FILE" if command == "/save" else "is no command: /help lists them"
            raise UsageError(f"{command} {needs}")
        return True

    def _answer(self, prompt: str) -> None:
        if self._console is None:
            write_answer(self._talk.answer(self._talk.ask(prompt)))
            return
        talk = self._talk
        drawing = Drawing(self._console, self._spelling, talk.policy, talk.config, self._least)
        drawing.show(lambda callback: talk.ask(prompt, callback))

    def _save(self, path: Path) -> None:
        """Write the records; a file is replaced only if this conversation has written it."""
        if path.exists() and path not in self._saved:
            raise UsageError(f"{path} is there: choose another name")
        count = write_records(self._talk.records, str(path))
        self._saved.add(path)
        self._say(f"{count} answers in {path}")

    def _options(self) -> str:
        config = self._talk.config
        values = {"temperature": config.temperature} | config.used(self._talk.policy.diffusion)
        return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())

    def _greet(self) -> None:
        policy, config = self._talk.policy, self._talk.config
        about = [policy.name, policy.family, f"{config.gen_length} tokens"]
        if policy.diffusion:
            about.append("1 block" if config.blocks == 1 else f"{config.blocks} blocks")
            about.append("" if config.steps is None else f"{config.steps} steps")
        self._say(", ".join(filter(None, about)))
        if self._console is not None:
            scale = Text("early ").append_text(
                Text.assemble(*(("■", colour) for colour in COLOURS)).append(" late")
            )
            self._console.print(scale.append(f"  {MASK} masked") if policy.diffusion else scale)
        if not self._talk.remembers:
            self._say("Without a chat template, each prompt stands alone.")
        self._say("/help lists commands.")

    def _say(self, text: str) -> None:
        """A line about the conversation, for somebody at a terminal."""
        if self._console is not None:
            self._console.print(Text(for_terminal(text), style="dim"))
        elif self._typed and sys.stdout.isatty():
            print(for_terminal(text), flush=True)
        elif self._typed:
            print(for_terminal(text), file=sys.stderr)


def write_answer(text: str) -> None:
    """Write a text to standard output: as it is, or to a terminal without what it would obey."""
    text = for_terminal(text) if sys.stdout.isatty() else text
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
    sys.stdout.buffer.flush()
