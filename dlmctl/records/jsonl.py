"""JSON Lines in and out: one record per line, `file:line` in every error, whole lines only.

Readers are lazy: the first record leaves before the last one arrives. Writers flush every record,
so that the next stage of a pipe can start on it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""Most levels of lists and objects in a record. orjson reads 1024 and writes 254, and Python shows
about as many; what was read must be writable, with a few levels around it."""


class Record(dict[str, Any]):
    """One JSON object of the stream; `where` is the `file:line` it was read from."""

    where: str = ""


def located(fields: Mapping[str, Any], where: str) -> Record:
    """A new record of these fields, read from `where`."""
    record = Record(fields)
    record.where = where
    return record


def read_records(files: Sequence[str], on_error: OnError = "fail") -> Iterator[Record]:
    """Records of JSONL files, in order; `-`, or no file, is standard input.

    Raises:
        MissingInputError: a file cannot be read.
        DataError: a line is not a JSON object (only with `on_error="fail"`).
    """
    yield from parse_lines(read_lines(files), on_error)


def read_lines(files: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The `file:line` and the text of each line that is not blank; raises MissingInputError."""
    for name in files or ["-"]:
        with _open(name) as stream:
            label = "<stdin>" if name == "-" else name
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield f"{label}:{number}", line


def parse_lines(lines: Iterable[tuple[str, bytes]], on_error: OnError = "fail") -> Iterator[Record]:
    """Records of the lines of `read_lines`; raises as `read_records`."""
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
    # Few brackets cannot nest deeply, and counting them costs next to nothing.
    if line.count(b"[") + line.count(b"{") > DEEPEST and deeper_than(value, DEEPEST):
        raise DataError(f"lists and objects are nested more than {DEEPEST} levels deep", where)
    return located(value, where)


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more levels than this."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        inner = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
        level = [x for x in inner if isinstance(x, (dict, list))]
    return bool(level)


def each(
    records: Iterable[Record], function: Callable[[Record], Record], on_error: OnError | None = None
) -> Iterator[Record]:
    """Apply `function` to every record; a record that has an `error` passes unchanged.

    Args:
        on_error: None if failing is the only choice.
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
    """What becomes of a faulty record: raise, leave it out, or pass it on with `error`."""
    if on_error is None or on_error == "fail":
        error.skippable = on_error is not None
        raise error
    if on_error == "skip":
        print(f"dlmctl: skipped: {error}", file=sys.stderr)
        return
    said = {"where": error.where, "message": error.message}
    yield located({**record, "error": said}, record.where)


def field(record: Record, name: str, kind: type | tuple[type, ...], hint: str = "") -> Any:
    """The value of a required field of this type; raises DataError if it is missing or another."""
    value = record.get(name)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    state = "is missing" if value is None else f"is {type(value).__name__}"
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    advice = f"; {hint}" if hint else ""
    raise DataError(f"field '{name}' {state}, expected {wanted}{advice}", record.where)


def object_field(record: Record, name: str) -> dict[str, Any]:
    """A field that is an object, empty if it is missing; raises DataError for anything else."""
    return field(record, name, dict) if record.get(name) is not None else {}


def nested(record: Record, name: str) -> Any:
    """A field, or with dots a field within a field, as `rollout.order`; None if it is missing."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def dump(record: Any) -> bytes:
    """One line of JSON with keys in their order; numpy numbers are allowed.

    Raises:
        DataError: a value has no JSON, such as bytes from a table.
    """
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        where = getattr(record, "where", "")
        raise DataError(f"it cannot be written as JSON ({error})", where) from None


def write_records(
    records: Iterable[Any],
    output: str = "-",
    resume: Resume | None = None,
    standing: Callable[[], str] | None = None,
) -> int:
    """Write records to `output` (`-`: standard output) and return how many.

    A file grows as `OUTPUT.partial` and gets its name when the stream ends; after a failure the
    partial file keeps its records. Only one process at a time can write it. A device or a named
    pipe, such as /dev/stderr, is written in place.

    Args:
        resume: what the partial file keeps, for a stage that can resume.
        standing: the message if the command is interrupted; None says how many records there are,
            and where.

    Raises:
        CannotCreateError: the file cannot be created.
        CannotWriteError: writing failed, for example on a full disk.
        TryAgainError: another process writes the file.
        BrokenPipeError: nobody reads standard output any more.
    """
    count = 0

    def counted() -> str:
        if output == "-" or _in_place(output):
            return f"{count} records were written"
        lines = count + (resume.lines if resume else 0)
        return f"{lines} records are in {output}.partial{_how(resume)}"

    describe(standing or counted)
    shared = output == "-" and os.isatty(1)  # the terminal also shows the line of progress
    with _sink(output, resume) as stream:
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


def _how(resume: Resume | None) -> str:
    return "; the same command with --resume continues it" if resume else ""


@contextlib.contextmanager
def _sink(output: str, resume: Resume | None) -> Iterator[IO[bytes]]:
    if output == "-":
        yield sys.stdout.buffer
        return
    if _in_place(output):
        device = _opened(output)
        with _closing(device, output):
            yield device
        return
    partial = Path(f"{output}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(partial, output)
        stream = partial.open("r+b")
        stream.truncate(resume.size if resume else 0)
        stream.seek(0, os.SEEK_END)
    except OSError as error:
        raise CannotCreateError(f"cannot create {output} ({error.strerror})") from None
    try:
        with _closing(stream, output):
            yield stream
    except Interrupted:
        raise  # what `describe` was given says it
    except BaseException:
        print(f"dlmctl: what was produced so far is in {partial}{_how(resume)}", file=sys.stderr)
        raise
    os.replace(partial, output)
    lock.release()


@contextlib.contextmanager
def _closing(stream: IO[bytes], name: str) -> Iterator[None]:
    """Close a stream at the end; after a failure, another failure to flush is not reported."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            stream.close()
        raise
    try:
        stream.close()
    except OSError as error:  # a network file system may report it only now
        raise CannotWriteError(f"cannot write {name} ({error.strerror})") from None


def _in_place(output: str) -> bool:
    """Whether a name is of a device, a pipe or the like, which a file must not replace."""
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
