"""One server of several: whether it can be asked now, and what it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dlmctl.engines.connection import Connection, Lost
from dlmctl.engines.protocol import (
    PROBES,
    Answer,
    Engine,
    Generation,
    Weights,
    before_temperature,
)
from dlmctl.engines.sglang import SGLang
from dlmctl.engines.vllm import VLLM
from dlmctl.records.errors import UsageError

ENGINES: tuple[type[Engine], ...] = (SGLang, VLLM)

GIVE_UP = 5
"""Failures in a row after which a server is asked no more."""
FIRST_WAIT = 0.5
"""Seconds after the first failure; each further one doubles them."""


class Server:
    """A server that is asked by several threads.

    After a failure it has to show again that it has the right weights: it may have been restarted.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.connection = Connection(url, timeout)
        self.url = self.connection.url
        self.reason = ""
        """Why it was lost last."""
        self.said_given_up = False
        """Whether the user knows that it is left out."""
        self._engine: Engine | None = None
        self._weights: Weights | None = None
        self._best: dict[float, float] = {}
        """By temperature, what it says of the most probable token after the first prompt."""
        self._first: list[int] = []
        self._ready = False
        self.turn = 0
        """A number that each failure changes: of requests lost together, the first one counts."""
        self._failures = 0
        self._asked_again = 0.0
        """When it may be asked again, by `time.monotonic`."""
        self._preparing = threading.Lock()
        self._counting = threading.Lock()

    @property
    def given_up(self) -> bool:
        """Whether it is asked no more."""
        return self._failures >= GIVE_UP and not self._ready

    def begin(self, weights: Weights) -> None:
        """Sample from these weights from now on, whatever happened before."""
        self._weights, self._ready, self._failures = weights, False, 0
        self._asked_again, self.said_given_up = 0.0, False
        self._first, self._best = [], {}

    def prepare(self, wait: Callable[[float], bool]) -> int | None:
        """Return when it can be asked; None if it has been given up.

        Args:
            wait: sleeps this long; returns true if nothing is wanted any more.

        Returns:
            What `generate` is to be called with.

        Raises:
            UsageError: it serves another model, or no engine that is known.
            DataError: it cannot load the weights, or does not follow its protocol.
        """
        with self._preparing:
            while not self._ready and self._failures < GIVE_UP:
                if wait(max(0.0, self._asked_again - time.monotonic())):
                    return None
                turn = self.turn
                try:
                    self._prepare()
                except Lost as error:
                    self._lost(error, turn)
            return self.turn if self._ready else None

    def _prepare(self) -> None:
        assert self._weights is not None
        if self._engine is None:
            self._engine = recognised(self.connection)
        self._engine.take(self._weights)
        self._ready = True

    def generate(self, generation: Generation, turn: int) -> Answer:
        """One completion; raises Lost, and DataError for an answer that cannot be used."""
        engine = self._engine
        assert engine is not None
        try:
            answer = engine.generate(generation)
            self._failures = 0
            known = generation.as_the_model or self._gives_model_log_probs(engine, generation)
        except Lost as error:
            self._lost(error, turn)
            raise
        return answer if known else answer._replace(log_probs=None)

    def _gives_model_log_probs(self, engine: Engine, generation: Generation) -> bool:
        with self._preparing:
            self._first = self._first or generation.prompt
            for temperature in PROBES:
                if temperature not in self._best:
                    self._best[temperature] = engine.best_log_prob(self._first, temperature)
            return before_temperature([self._best[temperature] for temperature in PROBES])

    def _lost(self, error: Lost, turn: int) -> None:
        """Ask no more for a while, unless that has been done since the request began."""
        with self._counting:
            if turn != self.turn:
                return
            self.turn += 1
            self._ready = False
            self.reason = str(error)
            self._asked_again = time.monotonic() + FIRST_WAIT * 2**self._failures
            self._failures += 1


def recognised(connection: Connection) -> Engine:
    """The engine behind a URL.

    Raises:
        Lost: nothing answers.
        UsageError: something else answers.
    """
    for engine in ENGINES:
        if (found := engine.recognised(connection)) is not None:
            return found
    raise UsageError(
        f"{connection.url} is neither SGLang (it has no /model_info) nor vLLM (it has no /version)"
    )
