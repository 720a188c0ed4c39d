"""Errors that are meant for the user, and their exit codes (sysexits.h)."""

from __future__ import annotations


class UserFacingError(Exception):
    """A failure that the user can fix: one line on standard error, no traceback."""

    exit_code = 1


class UsageError(UserFacingError):
    """The command line does not make sense (exit 2)."""

    exit_code = 2


class DataError(UserFacingError):
    """A record or a file has something that cannot be used (exit 65)."""

    exit_code = 65
    skippable = False
    """Whether the stage can continue without the record, under --on-error skip."""

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        """`file:line`, added by whoever knows it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class MissingInputError(UserFacingError):
    """A named file, directory or model does not exist (exit 66)."""

    exit_code = 66


class UnavailableError(UserFacingError):
    """A device or an optional package is missing; the message says what to do (exit 69)."""

    exit_code = 69


class CannotCreateError(UserFacingError):
    """An output file or directory cannot be created (exit 73)."""

    exit_code = 73


class CannotWriteError(UserFacingError):
    """Writing failed half-way, for example because the disk is full (exit 74)."""

    exit_code = 74


class TryAgainError(UserFacingError):
    """A failure that may pass: a hub that does not answer, a lock that is taken (exit 75)."""

    exit_code = 75


def missing_package(package: str, extra: str, purpose: str) -> UnavailableError:
    """The error for an optional package: what needs it, and the command that installs it."""
    return UnavailableError(
        f"{purpose} needs the package {package}, which is not installed: "
        f"run  pip install 'dlmctl[{extra}]'"
    )


def reason_of(error: BaseException) -> str:
    """The first line of what another package says, at most 300 characters; else its type."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
