"""Makes opening a file of the source tree an error; imported as Python starts.

DLMCTL_SOURCE is the source tree. DLMCTL_PACKAGES may be in it and is allowed, with the environment
that it belongs to.
"""

from __future__ import annotations

import os
import sys
from typing import Any

SOURCE = os.path.realpath(os.environ["DLMCTL_SOURCE"]) + os.sep
ENVIRONMENT = os.path.realpath(os.path.join(os.environ["DLMCTL_PACKAGES"], *[".."] * 3)) + os.sep


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook; raises PermissionError."""
    if event != "open" or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.path.realpath(os.fsdecode(arguments[0]))
    if path.startswith(SOURCE) and not path.startswith(ENVIRONMENT):
        raise PermissionError(f"{path} belongs to the source tree")


sys.addaudithook(refuse)
