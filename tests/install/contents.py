"""Compares what is in the sdist and the wheel with the files of the source tree.

    python tests/install/contents.py ROOT DIST

The sdist must have every file of the repository; the wheel every file under dlmctl/, and the manual
pages. Neither may have others, but for metadata.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

GENERATED = ("PKG-INFO", "setup.cfg")
MANUAL = "share/man/man1/"


def of_repository(root: Path) -> set[str]:
    """Files that git tracks, or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    return {name for name in listed.decode().split("\0") if name and (root / name).is_file()}


def of_sdist(path: Path) -> set[str]:
    """Files without the leading folder and without metadata."""
    with tarfile.open(path) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    return {n for n in names if n not in GENERATED and ".egg-info/" not in n}


def of_wheel(path: Path) -> set[str]:
    """Files without metadata; those for the environment's share/man by that path."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    names = [name.partition(".data/data/")[2] or name for name in names]
    return {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")}


def expected_wheel(tree: Iterable[str]) -> set[str]:
    """What the wheel must have of the files of the source tree."""
    package = {name for name in tree if name.startswith("dlmctl/")}
    manual = {name for name in tree if name.startswith("man/") and name.endswith(".1")}
    return package | {name.replace("man/", MANUAL, 1) for name in manual}


def differences(kind: str, there: set[str], expected: set[str]) -> list[str]:
    """A line for each file that is missing or superfluous."""
    missing = [f"{kind} lacks {name}" for name in sorted(expected - there)]
    return missing + [f"{kind} has {name}" for name in sorted(there - expected)]


def main(root: Path, dist: Path) -> int:
    """Exit status 1 if anything differs."""
    tree = of_repository(root)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    lines = differences("the sdist", of_sdist(sdist), tree)
    lines += differences("the wheel", of_wheel(wheel), expected_wheel(tree))
    print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
