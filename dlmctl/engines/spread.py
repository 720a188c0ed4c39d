"""Many requests over several servers: each answered once, the answers in the order of the requests.

A thread for each request that may be under way asks one server. The requests of a server that is
lost go to the others. Threads are daemons: a command that ends does not wait for an answer.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from dlmctl.engines.connection import Lost
from dlmctl.engines.protocol import Answer, Generation
from dlmctl.engines.server import GIVE_UP, Server
from dlmctl.records.errors import DataError, TryAgainError, UserFacingError

POLL_SECONDS = 1.0


class _Job:
    """A request, and what came of it."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.result: Answer | Exception | None = None
        self.lost = 0
        """How often it was."""


class Spread:
    """Requests that are under way."""

    def __init__(self, servers: Sequence[Server], at_a_time: int) -> None:
        """Args:
        at_a_time: requests under way at each server.
        """
        self._servers = servers
        self._at_a_time = at_a_time
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._failed: Exception | None = None
        """Why all has to end."""

    def answers(self, generations: Iterable[Generation]) -> Iterator[Answer]:
        """An answer for each request.

        Raises:
            TryAgainError: no server is left, or a request was lost again and again.
            UserFacingError: an answer cannot be used, or a server serves something else; the
                answers before it have come.
        """
        for server in self._servers:
            for _ in range(self._at_a_time):
                threading.Thread(target=self._work, args=(server,), daemon=True).start()
        # More than can be under way, so that a long one does not keep the others waiting.
        most = 2 * self._at_a_time * len(self._servers)
        ahead: deque[_Job] = deque()
        try:
            for generation in generations:
                ahead.append(_Job(generation))
                with self._changed:
                    self._jobs.append(ahead[-1])
                    self._changed.notify()
                while ahead and (len(ahead) >= most or ahead[0].result is not None):
                    yield self._result(ahead.popleft())
            while ahead:
                yield self._result(ahead.popleft())
        finally:
            self._over.set()
            with self._changed:
                self._changed.notify_all()

    def _result(self, job: _Job) -> Answer:
        with self._changed:
            while job.result is None and self._failed is None:
                self._changed.wait(POLL_SECONDS)
        result = job.result or self._failed
        if isinstance(result, Answer):
            return result
        assert result is not None
        raise result

    def _work(self, server: Server) -> None:
        """Ask one server, request after request."""
        try:
            while (turn := server.prepare(self._over.wait)) is not None:
                job = self._next()
                if job is None:
                    return
                if server.turn == turn:
                    self._ask(server, job, turn)
                else:  # it was lost while this thread waited for a request
                    self._put_back(job)
            if server.given_up:
                self._give_up(server)
        except Exception as error:
            self._fail(error)

    def _next(self) -> _Job | None:
        """The next request; None when nothing is wanted any more."""
        with self._changed:
            while not self._jobs and not self._over.is_set():
                self._changed.wait(POLL_SECONDS)
            return None if self._over.is_set() else self._jobs.popleft()

    def _ask(self, server: Server, job: _Job, turn: int) -> None:
        try:
            result: Answer | Exception = server.generate(job.generation, turn)
        except Lost as error:
            self._again(job, error)
            return
        except UserFacingError as error:
            result = error
            if isinstance(error, DataError):
                error.where = error.where or job.generation.where
        with self._changed:
            job.result = result
            self._changed.notify_all()

    def _put_back(self, job: _Job) -> None:
        with self._changed:
            self._jobs.appendleft(job)
            self._changed.notify_all()

    def _again(self, job: _Job, error: Lost) -> None:
        """Put a lost request in front, unless it may itself be what servers fail at."""
        with self._changed:
            job.lost += 1
            if job.lost <= GIVE_UP * len(self._servers):
                self._jobs.appendleft(job)
            else:
                where = f"{job.generation.where}: " if job.generation.where else ""
                job.result = TryAgainError(f"{where}lost {job.lost} times, the last time: {error}")
            self._changed.notify_all()

    def _give_up(self, server: Server) -> None:
        """Say once that a server is left out, and end if no other is there."""
        with self._changed:
            said, server.said_given_up = server.said_given_up, True
        if all(other.given_up for other in self._servers):
            self._fail(TryAgainError(f"no server is left: {server.reason}"))
        elif not said:
            print(f"dlmctl: going on without a server: {server.reason}", file=sys.stderr)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failed = self._failed or error
            self._changed.notify_all()
