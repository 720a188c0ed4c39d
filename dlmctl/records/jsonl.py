"""JSON Lines in and out: one record per line, file:line in every complaint, whole lines only.

Readers are lazy: the first record leaves before the last one arrives. Writers flush every record,
so that the next stage of a pipe can start on it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import orjson

from dlmctl.records.errors import (
    CannotCreateError,
    CannotWriteError,
    DataError,
    MissingInputError,
)
from dlmctl.records.interrupts import Interrupted, describe
from dlmctl.records.locks import hold
from dlmctl.records.stderr import aside
from dlmctl.records.stdin import stdin_lines

if TYPE_CHECKING:
    from dlmctl.records.resume import Resume

OnError = Literal["fail", "skip", "keep"]
DEEPEST = 200
"""Levels of lists and objects in a record. orjson reads 1024 and writes 254, and Python shows about
as many; what is read must be fit to be passed on, with a few levels around it."""


class Record(dict[str, Any]):
    """One JSON object of the stream; `where` is the `file:line` it was read from."""

    where: str = ""


def read_records(files: Sequence[str], on_error: OnError = "fail") -> Iterator[Record]:
    """Records of the named JSONL files in order; `-`, or no file at all, is standard input.

    Raises:
        MissingInputError: a file is not there or cannot be read.
        DataError: a line is not a JSON object (only with `on_error="fail"`).
    """
    yield from parse_lines(read_lines(files), on_error)


def read_lines(files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Lines of the named files that are not blank, each after its `file:line`; see `read_records`.

    Raises:
        MissingInputError: a file is not there or cannot be read.
    """
    for name in files or ["-"]:
        with _open(name) as stream:
            label = "<stdin>" if name == "-" else name
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield f"{label}:{number}", line


def parse_lines(lines: Iterable[tuple[str, bytes]], on_error: OnError = "fail") -> Iterator[Record]:
    """Records of such lines; raises as `read_records`."""
    for where, line in lines:
        try:
            yield parse_record(line, where)
        except DataError as error:
            text = line.decode("utf-8", "replace").rstrip("\n")
            yield from faulty(Record(line=text), error, on_error)


def parse_record(line: bytes, where: str) -> Record:
    """One line of JSONL as a record; raises DataError if it is not a JSON object."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"not JSON ({error}); expected one object per line", where) from None
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {type(value).__name__}", where)
    # Few brackets cannot be deep, and counting them costs next to nothing.
    if line.count(b"[") + line.count(b"{") > DEEPEST and _is_deep(value):
        raise DataError(f"lists and objects are nested more than {DEEPEST} levels deep", where)
    record = Record(value)
    record.where = where
    return record


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
        level = [x for x in inner if isinstance(x, (dict, list))]
    return bool(level)


def each(
    records: Iterable[Record], function: Callable[[Record], Record], on_error: OnError | None = None
) -> Iterator[Record]:
    """Apply `function` to every record; a record that already has an `error` passes untouched.

    `on_error` is None if there is no choice but to fail.
    """
    for record in records:
        if "error" in record:
            yield record
            continue
        try:
            result = function(record)
        except DataError as error:
            error.where = error.where or record.where
            yield from faulty(record, error, on_error)
        else:
            yield result


def faulty(record: Record, error: DataError, on_error: OnError | None) -> Iterator[Record]:
    """What becomes of a record that cannot be used: raise, leave it out, or pass it on marked."""
    if on_error is None or on_error == "fail":
        error.skippable = on_error is not None
        raise error
    if on_error == "skip":
        print(f"dlmctl: skipped: {error}", file=sys.stderr)
        return
    marked = Record(record)
    marked.where = record.where
    marked["error"] = {"where": error.where, "message": error.message}
    yield marked


def field(record: Record, name: str, kind: type | tuple[type, ...], hint: str = "") -> Any:
    """The value of a field that must be there and of that type; raises DataError otherwise."""
    value = record.get(name)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    found = "is missing" if value is None else f"is {type(value).__name__}"
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    advice = f"; {hint}" if hint else ""
    raise DataError(f"field '{name}' {found}, expected {wanted}{advice}", record.where)


def object_field(record: Record, name: str) -> dict[str, Any]:
    """A field that is an object, empty where there is none; raises DataError on anything else."""
    return field(record, name, dict) if record.get(name) is not None else {}


def nested(record: Record, name: str) -> Any:
    """A field, or with dots one within fields, as `rollout.order`; None where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def dump(record: Any) -> bytes:
    """One line of JSON, numpy numbers included, keys in their order; raises DataError.

    As of a column of bytes in a table.
    """
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        where = getattr(record, "where", "")
        raise DataError(f"it cannot be written as JSON ({error})", where) from None


def write_records(
    records: Iterable[Any],
    output: str = "-",
    going: Resume | None = None,
    standing: Callable[[], str] | None = None,
) -> int:
    """Write records to `output` (`-`: standard output) and return how many.

    A file grows as `OUTPUT.partial` and takes its name when the stream ends; after a failure the
    records that were made stay in the partial file. One process at a time writes it. What is no
    file, as /dev/stderr or a named pipe, is written as it is.

    Args:
        going: what of the partial file stays, of a stage that can go on with it.
        standing: what is said where the command is interrupted; None says how many records there
            are, and where.

    Raises:
        CannotCreateError: the file cannot be made.
        CannotWriteError: writing failed, for example on a full disk.
        TryAgainError: another process writes the file.
        BrokenPipeError: the reader of standard output went away.
    """
    count = 0

    def stands() -> str:
        if output == "-" or _in_place(output):
            return f"{count} records were written"
        lines = count + (going.lines if going else 0)
        return f"{lines} records are in {output}.partial{_how(going)}"

    describe(standing or stands)
    shared = output == "-" and os.isatty(1)  # with the line of progress
    with _sink(output, going) as stream:
        for record in records:
            line = dump(record)
            try:
                with aside() if shared else contextlib.nullcontext():
                    stream.write(line)
                    stream.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                name = "standard output" if output == "-" else output
                raise CannotWriteError(
                    f"cannot write {name} ({error.strerror}); {count} records were written"
                ) from None
            count += 1
    return count


def _how(going: Resume | None) -> str:
    return "; the same command with --resume goes on with it" if going else ""


@contextlib.contextmanager
def _sink(output: str, going: Resume | None) -> Iterator[IO[bytes]]:
    if output == "-":
        yield sys.stdout.buffer
        return
    if _in_place(output):
        with _closing(_opened(output), output) as stream:
            yield stream
        return
    partial = Path(f"{output}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(partial, output)
        stream = partial.open("r+b")
        stream.truncate(going.size if going else 0)
        stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise CannotCreateError(f"cannot create {output} ({error.strerror})") from None
    try:
        with _closing(stream, output):
            yield stream
    except Interrupted:
        raise  # `describe` says it
    except BaseException:
        print(f"dlmctl: what was produced so far is in {partial}{_how(going)}", file=sys.stderr)
        raise
    os.replace(partial, output)
    lock.release()


@contextlib.contextmanager
def _closing(stream: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """Close it; what could not be written is tried once more then, and has been told of."""
    try:
        yield stream
    except BaseException:
        with contextlib.suppress(OSError):
            stream.close()
        raise
    try:
        stream.close()
    except OSError as error:  # a network's file system may say it no sooner
        raise CannotWriteError(f"cannot write {name} ({error.strerror})") from None


def _in_place(output: str) -> bool:
    """Whether a name is of a device, a pipe or the like, which no file may take the place of."""
    return os.path.exists(output) and not os.path.isfile(output)


def _opened(output: str) -> IO[bytes]:
    try:
        return open(output, "wb")
    except OSError as error:
        raise CannotCreateError(f"cannot create {output} ({error.strerror})") from None


def _open(name: str) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    if name == "-":
        return contextlib.nullcontext(stdin_lines())
    try:
        return open(name, "rb")
    except OSError as error:
        raise MissingInputError(f"cannot read {name} ({error.strerror})") from None
