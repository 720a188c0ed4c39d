"""`dlmctl`, and `python -m dlmctl`.

Imports nothing before `main`, which first of all lets a Ctrl-C end the process as it ends any
other: until the command line listens to signals itself there is nothing to tidy up, and what Python
would show is a traceback from amid its imports.
"""

from __future__ import annotations

# What `signal` is made of: that module imports several others, and meanwhile a Ctrl-C would be
# Python's still.
from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal


def main() -> None:
    """Entry point of the console script."""
    if getsignal(SIGINT) is default_int_handler:  # else it is ignored (nohup)
        signal(SIGINT, SIG_DFL)
    from dlmctl import cli

    cli.main()


if __name__ == "__main__":
    main()
