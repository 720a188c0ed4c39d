"""Replies of a judge in a SQLite file, by the hash of the question."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from dlmctl.records.errors import CannotWriteError, DataError, TryAgainError

WAIT_SECONDS = 30.0
"""How long another process may hold the file."""


class ReplyCache:
    """A file that several processes may use; each reply is safe as soon as it is put there."""

    def __init__(self, path: Path) -> None:
        """Open or create it.

        Raises:
            DataError: the file is something else.
            CannotWriteError: it cannot be opened or written.
            TryAgainError: another process holds it too long.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS replies (question TEXT PRIMARY KEY, reply TEXT)"
            )
            self._file.execute("SELECT question, reply FROM replies LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise self._failure(error) from None

    def get(self, question: str) -> str | None:
        """The reply to the question of this hash, if there is one."""
        try:
            row = self._file.execute(
                "SELECT reply FROM replies WHERE question = ?", (question,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._failure(error) from None
        return row[0] if row else None

    def put(self, question: str, reply: str) -> None:
        """Keep a reply; the first one to a question stays."""
        try:
            self._file.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (question, reply))
        except sqlite3.Error as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _failure(self, error: Exception) -> Exception:
        said = str(error)
        if "locked" in said:
            return TryAgainError(f"another process holds {self._path}; try again")
        if "not a database" in said or "no such column" in said or "malformed" in said:
            return DataError(f"--judge-cache {self._path} is not a file of replies ({said})")
        return CannotWriteError(f"cannot use --judge-cache {self._path} ({said})")
