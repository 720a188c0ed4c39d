"""To the Hugging Face hub and back; huggingface_hub sends and fetches.

A push is one commit: until the last file has arrived none of them is visible, and the same command
sends what is missing. A pull goes to a directory beside its target, which is renamed when it is
whole, and from which the same command resumes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dlmctl import __version__
from dlmctl.models.weights import read_weights, weight_files
from dlmctl.records.errors import (
    CannotCreateError,
    CannotWriteError,
    DataError,
    MissingInputError,
    TryAgainError,
    UsageError,
    UserFacingError,
)
from dlmctl.records.files import check_free, make_directory
from dlmctl.train.card import HUB_NAME
from dlmctl.train.hub_contents import ADAPTER, PICKLES, PLAIN, WEIGHTS, Contents, matches

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")
"""Packages whose errors are those of sending and fetching."""
INDEX = "model.safetensors.index.json"


def at_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """A repository and its revision, which may follow the name.

    Raises:
        UsageError: it is no name of a repository, or there are two revisions.
    """
    repository, _, behind = name.partition("@")
    if not HUB_NAME.fullmatch(repository) or repository.count("/") != 1:
        raise UsageError(f"{name} is no repository of the hub: give USER/NAME")
    if behind and revision and behind != revision:
        raise UsageError(f"{name} and --revision {revision} are two revisions: give one")
    return repository, behind or revision


def push(
    contents: Contents,
    repository: str,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    quiet: bool = False,
) -> str:
    """Send files in one commit, and create the repository and the branch if they are not there.

    Returns:
        What was done, in a sentence.

    Raises:
        CannotCreateError: the hub refuses.
        UsageError: the repository has other weights that a loader may take, or is public although
            it is to be private.
        DataError: the header of the card is refused.
        TryAgainError: the hub does not answer, or with a fault of its own.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api(quiet)
    with _explained(repository, writing=True):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        head = api.model_info(repository, revision=revision)
        if private and not head.private:
            raise UsageError(
                f"{repository} was there before and is public: make it private on the hub, or "
                "leave --private out"
            )
        _check_beside(repository, [s.rfilename for s in head.siblings or ()], contents)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, data) for name, data in sorted(contents.files.items())],
            commit_message=message or f"Push {contents.title} by dlmctl {__version__}",
            revision=revision,
        )
    if commit.oid == head.sha:
        return f"{repository} has these files already, at {commit.oid[:12]}"
    size = size_text(sum(row["bytes"] for row in contents.rows()))
    return f"pushed {len(contents.files)} files ({size}): {commit.commit_url}"


def pull(
    repository: str,
    directory: Path,
    revision: str | None = None,
    include: Sequence[str] = (),
    quiet: bool = False,
) -> str:
    """Fetch weights and text into a directory.

    Args:
        include: patterns of further files.

    Returns:
        What was done, in a sentence.

    Raises:
        CannotCreateError: the directory is there and not empty.
        MissingInputError: there is no such repository or revision, or it has no weights.
        DataError: it has pickled weights alone, or a file of weights is not whole.
        TryAgainError: the hub does not answer, or with a fault of its own.
    """
    from huggingface_hub import snapshot_download

    directory = directory.expanduser().absolute()
    check_free(directory)
    api = _api(quiet)
    with _explained(f"{repository}{f'@{revision}' if revision else ''}"):
        info = api.model_info(repository, revision=revision)
        names = _chosen(repository, [s.rfilename for s in info.siblings or ()], include)
        partial = directory.with_name(f".{directory.name}.pull")
        make_directory(partial)
        exact = [glob.escape(name) for name in names]
        snapshot_download(repository, revision=info.sha, local_dir=partial, allow_patterns=exact)
        # If the hub falls silent, the client may return what there is.
        if missing := [name for name in names if not (partial / name).is_file()]:
            raise OSError(f"{missing[0]} has not arrived")
    # What an earlier pull of something else left.
    for path in partial.rglob("*"):
        if path.is_file() and path.relative_to(partial).as_posix() not in names:
            path.unlink()
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    _check_whole(partial, names)
    try:
        partial.replace(directory)
    except OSError as error:
        raise CannotCreateError(f"cannot create {directory} ({error.strerror})") from None
    return f"wrote {directory}: {len(names)} files of {repository} at {str(info.sha)[:12]}"


def size_text(size: int) -> str:
    """A number of bytes for people."""
    units = ("B", "kB", "MB", "GB")
    power = next((n for n in range(len(units) - 1) if size < 999.5 * 1000**n), len(units) - 1)
    return f"{size / 1000**power:.3g} {units[power]}"


def _api(quiet: bool) -> Any:
    """The hub's client; it shows progress on a terminal alone. Raises TryAgainError offline."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars, logging

    if constants.HF_HUB_OFFLINE:
        raise TryAgainError("HF_HUB_OFFLINE is set, and this needs the hub: unset it")
    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="dlmctl", library_version=__version__)


def _check_beside(repository: str, there: Sequence[str], contents: Contents) -> None:
    """Refuse to put weights beside others, of which a loader would take the wrong ones."""
    defining = (WEIGHTS, INDEX, ADAPTER)
    places = {PurePosixPath(name).parent for name in contents.files if matches(name, (WEIGHTS,))}
    for name in there:
        path = PurePosixPath(name)
        if path.parent in places and name not in contents.files and matches(path.name, defining):
            raise UsageError(
                f"{repository} has {name}, which this push does not replace: delete it there, or "
                "push to another repository"
            )


def _chosen(repository: str, there: Sequence[str], include: Sequence[str]) -> list[str]:
    """The files that are fetched."""
    names = [
        name
        for name in there
        if matches(name, include)
        or (matches(PurePosixPath(name).name, PLAIN) and not name.startswith("."))
    ]
    if any(matches(name, (WEIGHTS, *include)) for name in names):
        return names
    pickled = [name for name in there if matches(name, PICKLES)]
    if pickled:
        raise DataError(
            f"{repository} has no safetensors, only pickled weights ({pickled[0]}), which are not "
            "fetched; give --include for those that 'dlmctl sae-convert' reads"
        )
    raise MissingInputError(f"{repository} has no weights in safetensors")


def _check_whole(directory: Path, names: Sequence[str]) -> None:
    """Raise DataError or MissingInputError for weights that are damaged or incomplete."""
    if INDEX in names:
        weight_files(directory)
    for name in names:
        if matches(name, (WEIGHTS,)):
            read_weights([directory / name], str)


@contextlib.contextmanager
def _explained(name: str, writing: bool = False) -> Iterator[None]:
    """Turn what the client raises into errors for the user."""
    try:
        yield
    except UserFacingError:
        raise
    except Exception as error:  # of many kinds and packages
        chain = [error]
        while (cause := chain[-1].__cause__) is not None and isinstance(cause, Exception):
            chain.append(cause)
        known = (OSError, ValueError, RuntimeError)
        if not isinstance(error, known) and type(error).__module__.split(".")[0] not in CLIENTS:
            raise
        raise _error(name, chain, writing) from None


def _error(name: str, chain: Sequence[Exception], writing: bool) -> UserFacingError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = chain[0]
    responses = [r for e in chain if (r := getattr(e, "response", None)) is not None]
    status = responses[0].status_code if responses else None
    # Without the address, which may be signed.
    said = getattr(error, "server_message", None) or (responses and responses[0].reason_phrase)
    reason = str(said or error).strip().split("\n")[0]
    if isinstance(error, HFValidationError):
        return UsageError(f"{name} is no name of the hub ({reason})")
    if isinstance(error, GatedRepoError):
        return MissingInputError(f"{name} is gated: accept its terms there, then  hf auth login")
    if writing and status in (401, 403, 404):
        return CannotCreateError(
            f"the hub does not let you write {name} ({status} {reason}): log in by  hf auth login, "
            "or set HF_TOKEN to a token that may write there"
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingInputError(f"{name}: the repository has no such revision")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return MissingInputError(
            f"no {name} on the hub that you may read: look at its name, or log in by  hf auth login"
        )
    absent = (e for e in chain if isinstance(e, OSError) and e.errno == errno.ENOENT)
    if gone := next((e.filename for e in absent), None):
        return TryAgainError(f"{gone} is gone: a run that goes on has replaced its checkpoint")
    if any(isinstance(e, OSError) and e.errno in FULL for e in chain):
        return CannotWriteError(f"cannot write what {name} has ({reason})")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return DataError(" ".join(str(error).split()), "README.md")
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return CannotCreateError(f"the hub refuses {name} ({status} {reason})")
    then = "nothing of it is visible there; " if writing else ""
    what = f"answers {status} {reason}" if status else f"does not answer ({reason})"
    return TryAgainError(
        f"{name}: the hub {what}; {then}the same command {'sends' if writing else 'fetches'} what "
        "is missing"
    )
