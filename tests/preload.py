"""A parent of commands that imports once what each of them would.

Nearly all of a stage's start is the import of torch and transformers. The parent has them and forks
a child for each command: a process of its own, with its own descriptors, directory, environment and
exit, which can be killed like any other.

    python preload.py SOCKET

What it does not show is the start itself: an import that is missing or out of order, strings that
hash otherwise in each process. Some tests begin from nothing for that.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

LATE = ("sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch._dynamo")
"""What functions import where they need it."""
CLIENT = Path(__file__).with_name("preloaded.py")


@functools.cache
def parent() -> str:
    """Socket of a parent that lives as long as this process; beside it a script `dlmctl`."""
    directory = tempfile.TemporaryDirectory(prefix="dlmctl-tests-")
    address = f"{directory.name}/socket"
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a fork takes one thread along
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    script = Path(address).with_name("dlmctl")
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {CLIENT} {address} "$@"\n')
    script.chmod(0o755)

    @atexit.register
    def end() -> None:
        process.communicate()  # closes its standard input
        directory.cleanup()

    return address


def dlmctl_script() -> Path:
    """What stands for `dlmctl` on the PATH; killing it does not kill the command."""
    return Path(parent()).with_name("dlmctl")


def _serve(address: str) -> None:
    """Take requests until standard input ends; returns in each child, which is the command."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for a command are not waited for
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        _, descriptors, _, _ = socket.recv_fds(client, 1, 3)
        if os.fork() == 0:
            listener.close()
            return _become(client, descriptors)
        for number in (client.detach(), *descriptors):
            os.close(number)
    os._exit(0)


def _become(client: socket.socket, descriptors: list[int]) -> None:
    """Fork once more: the child returns as the command, its parent reports how it ended."""
    arguments, directory, environment = json.load(client.makefile())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # As a shell starts it; we ourselves may be in the background of one, which ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = os.fork()
    if command:
        for number in (0, 1, *descriptors):
            os.close(number)
        with contextlib.suppress(BrokenPipeError):  # the client has been killed
            client.sendall(b"%d\n" % command)
            _, status = os.waitpid(command, 0)
            client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    client.close()
    for number, standard in zip(descriptors, range(3), strict=True):
        os.dup2(number, standard)
        os.close(number)
    os.chdir(directory)
    home = os.environ.get("HF_HOME")
    os.environ.clear()
    os.environ.update(environment)
    if os.environ.get("HF_HOME") != home:
        _read_the_cache_elsewhere()
    sys.argv = ["dlmctl", *arguments]


def _read_the_cache_elsewhere() -> None:
    """Have the packages read again what they read of HF_HOME when they were imported."""
    for name in {"huggingface_hub.constants", "datasets.config"} & sys.modules.keys():
        importlib.reload(sys.modules[name])


def _warm() -> None:
    """What is made once in a process, and costs more than most of the commands."""
    from dlmctl.cli import load

    load("stats").make_context("stats", [])  # typer imports pydantic when it reads a first line
    with contextlib.suppress(ImportError, AttributeError):
        mapping = importlib.import_module("transformers.conversion_mapping")
        mapping.get_checkpoint_conversion_mapping("llama")  # a thousand expressions for names
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # hundreds of torch's, which every child would run


def main(address: str) -> None:
    """Import all of dlmctl, then be the parent."""
    import dlmctl

    gc.disable()  # all of it stays
    for module in pkgutil.walk_packages(dlmctl.__path__, "dlmctl."):
        # The harness subclasses a class of lm-eval, which may not be there.
        if not module.name.endswith(("__main__", "bench.lm_eval")):
            importlib.import_module(module.name)
    for name in LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _warm()
    gc.freeze()
    _serve(address)
    gc.enable()
    os._exit(_exit_code(dlmctl.cli.main))


def _exit_code(function: Callable[[], None]) -> int:
    """Of a process that is this function; what was imported is not taken down at its end."""
    try:
        function()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    main(sys.argv[1])
