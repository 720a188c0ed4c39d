"""Verifier `judge`: a model behind a server of chat completions scores each completion.

The question is a Jinja template, rendered in a sandbox; the score is a number that a regular
expression finds in the reply. Several questions are under way at once. A reply depends on the
question alone (temperature 0, a fixed seed), as far as the server holds to these, so that equal
questions are asked once, and never again if there is a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dlmctl.engines.connection import Connection, Lost
from dlmctl.engines.reply_cache import ReplyCache
from dlmctl.records.errors import DataError, MissingInputError, TryAgainError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.verify import Asking
from dlmctl.verifiers.answer import Verdict, completion_text

KEY = "DLMCTL_JUDGE_KEY"
PATH = "/v1/chat/completions"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two tries of a question; each is twice the one before."""
LONGEST_SHOWN = 500
"""Most characters of a reply in the verdict, its last ones."""
LONGEST_REPLY = 100_000
"""Most characters of a reply, its last ones, in which the score is looked for."""
TEMPLATE = """\
Grade the answer that an assistant gave to a request.

Request:
{{ request }}

{% if answer is defined and answer is not none %}Reference answer:
{{ answer }}

{% endif %}Answer of the assistant:
{{ completion }}

How right and how helpful is the answer? Give your reasons in a few sentences. Then end with a line
"Score: N", where N is a number from {{ low }} (useless or wrong) to {{ high }} (right in all).
"""

Question = dict[str, Any]
"""The body of a request."""


class Judge:
    """The model, the replies of the window that was looked at, and the cache."""

    def __init__(self, asking: Asking = Asking()) -> None:
        """Raises UsageError, MissingInputError, UnavailableError, and those of ReplyCache."""
        if not asking.judge_url or not asking.judge_model:
            raise UsageError("verifier judge needs --judge-url URL and --judge-model NAME")
        self._asking = asking
        self.window = 4 * asking.judge_at_a_time
        self._template = _template(asking)
        self._connection = Connection(asking.judge_url, asking.judge_timeout, "--judge-url", KEY)
        self._cache = ReplyCache(asking.judge_cache) if asking.judge_cache else None
        self._results: dict[str, str | Exception] = {}
        """Of the questions of a window, by their hashes."""
        self._away: TryAgainError | None = None
        self._heard = 0.0
        """time.monotonic() of the last reply."""
        self._over = threading.Event()

    def look(self, records: Sequence[Record]) -> None:
        """Ask what is not known; failures are raised when their record is judged."""
        questions: dict[str, Question] = {}
        for record in records:
            with contextlib.suppress(DataError):
                question = self._question(record)
                questions[_hash(question)] = question
        self._results = {}
        for key in list(questions):
            reply = self._cache.get(key) if self._cache else None
            if reply is not None:
                self._results[key] = reply
                del questions[key]
        self._ask(questions)

    def __call__(self, record: Mapping[str, Any]) -> Verdict:
        """The reward from 0 to 1, with the score and the reply.

        Raises:
            DataError: there is nothing to ask, or the reply has no score.
            TryAgainError: the server stays away.
            UsageError: the server wants another key.
        """
        key = _hash(self._question(record))
        if key not in self._results:
            self.look([Record(record)])
        result = self._results[key]
        if isinstance(result, DataError):
            raise DataError(result.message)  # a new one, to which its place is added
        if isinstance(result, Exception):
            raise result
        return self._verdict(result)

    def close(self) -> None:
        """Ask nothing more."""
        self._over.set()
        if self._cache:
            self._cache.close()

    def _question(self, record: Mapping[str, Any]) -> Question:
        asking = self._asking
        low, high = asking.scale
        given = {
            **record,
            "completion": completion_text(record),
            "request": request_text(record),
            "low": f"{low:g}",
            "high": f"{high:g}",
        }
        try:
            text = self._template.render(given)
        except Exception as error:  # the template is a program
            raise DataError(f"--judge-template cannot be filled in: {error}") from None
        return {
            "model": asking.judge_model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "seed": asking.seed,
            "max_tokens": asking.judge_tokens,
        }

    def _verdict(self, reply: str) -> Verdict:
        said = reply.rpartition("</think>")[2][-LONGEST_REPLY:]
        shown = said.strip()[-LONGEST_SHOWN:]
        found = [match[1] for match in self._asking.score.finditer(said)]
        try:
            score = float(found[-1])
        except (IndexError, TypeError, ValueError):
            raise DataError(
                f"the judge's reply has no score for --judge-score: ...{shown[-150:]!r}"
            ) from None
        low, high = self._asking.scale
        if not low <= score <= high:
            raise DataError(f"the judge's score {score:g} is not within {low:g} and {high:g}")
        return Verdict((score - low) / (high - low), {"score": score, "reply": shown})

    def _ask(self, questions: Mapping[str, Question]) -> None:
        """Ask all, several at once, and keep each reply as it comes."""
        jobs: queue.SimpleQueue[tuple[str, Question] | None] = queue.SimpleQueue()
        replies: queue.SimpleQueue[tuple[str, str | Exception]] = queue.SimpleQueue()
        count = min(self._asking.judge_at_a_time, len(questions))
        for job in (*questions.items(), *[None] * count):
            jobs.put(job)
        # Daemons: a command that is interrupted does not wait for replies.
        for _ in range(count):
            threading.Thread(target=self._work, args=(jobs, replies), daemon=True).start()
        for _ in questions:
            key, result = replies.get()
            self._results[key] = result
            if self._cache and isinstance(result, str):
                self._cache.put(key, result)

    def _work(self, jobs: queue.SimpleQueue[Any], replies: queue.SimpleQueue[Any]) -> None:
        while (job := jobs.get()) is not None:
            key, question = job
            try:
                replies.put((key, self._reply(question)))
            except Exception as error:
                replies.put((key, error))

    def _reply(self, question: Question) -> str:
        """The text of the reply, after as many tries as patience allows."""
        begin, pause = time.monotonic(), FIRST_PAUSE
        while self._away is None:
            try:
                answer = self._connection.post(PATH, question)
            except Lost as lost:
                silent = time.monotonic() - max(begin, self._heard)
                if silent + pause > self._asking.judge_patience:
                    self._away = TryAgainError(
                        f"the judge stays away ({lost}). What was judged is written; the same "
                        "command with -o FILE --resume, or with --judge-cache, asks only the rest"
                    )
                    break
                self._over.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._heard = time.monotonic()
                return self._text(answer)
        raise self._away or TryAgainError("the judge stays away")

    def _text(self, answer: Any) -> str:
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(f"the answer of {self._connection.url} has no text of a message")
        return text


def request_text(record: Mapping[str, Any]) -> str:
    """The prompt of a record, or its messages with their roles; empty if it has none."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        prompt = record.get("prompt")
        return prompt if isinstance(prompt, str) else ""
    said = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(content, str):
            raise DataError("field 'messages' has a message without text")
        said.append(content if len(messages) == 1 else f"{message.get('role')}: {content}")
    return "\n\n".join(said)


def _template(asking: Asking) -> Any:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = asking.judge_template
    try:
        source = TEMPLATE if path is None else path.read_text("utf-8")
    except OSError as error:
        raise MissingInputError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    try:
        return sandbox.from_string(source)
    except TemplateError as error:
        raise UsageError(f"--judge-template {path} is no template ({error})") from None


def _hash(question: Question) -> str:
    return hashlib.sha256(orjson.dumps(question, option=orjson.OPT_SORT_KEYS)).hexdigest()
