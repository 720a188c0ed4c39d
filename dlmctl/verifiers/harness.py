"""Runs untrusted code and its tests; a script for an isolated interpreter.

    python -I -S harness.py REPORT_FD  < request

It limits and confines itself before it runs the code, imports only the standard library, and
reports on a pipe, with a line for each step: token, step, and null or the problem as JSON.

Code that reads standard input runs as a program, once for each input, in a child that is limited
and confined and has no report; the step has what it printed, which is judged elsewhere, so that the
child never has what is expected of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import types
from collections.abc import Iterable
from typing import Any

LONGEST_MESSAGE = 200
"""Most characters of a reported failure."""
FILE_BYTES = 1 << 20
OPEN_FILES = 64
ERROR_BYTES = 4096
"""Bytes of standard error that are kept, the last ones."""
END = "end"

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x00010000
O_TRUNC = 0o1000

# Numbers of system calls: linux/arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h. Above 423 they are the same on all architectures.
EVERYWHERE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "fspick": 433, "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440,
    "mount_setattr": 442, "process_mrelease": 448, "fchmodat2": 452, "setxattrat": 463,
    "removexattrat": 466, "open_tree_attr": 467, "file_setattr": 469,
}  # fmt: skip
X86_64 = {
    "setpgid": 109, "setsid": 112,
    "shmget": 29, "socket": 41, "connect": 42, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
    "semget": 64, "msgget": 68, "truncate": 76, "ftruncate": 77, "chmod": 90, "fchmod": 91,
    "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101, "rt_sigqueueinfo": 129, "utime": 132,
    "setpriority": 141, "sched_setscheduler": 144, "pivot_root": 155, "adjtimex": 159,
    "chroot": 161, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167,
    "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172,
    "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179, "setxattr": 188,
    "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "tkill": 200, "clock_settime": 227, "tgkill": 234, "utimes": 235,
    "mq_open": 240, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "fchownat": 260, "futimesat": 261, "fchmodat": 268, "unshare": 272, "utimensat": 280,
    "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300,
    "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "memfd_create": 319,
    "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
AARCH64 = {
    "setpgid": 154, "setsid": 157,
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
    "fremovexattr": 16, "umount2": 39, "mount": 40, "pivot_root": 41, "truncate": 45,
    "ftruncate": 46, "chroot": 51, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
    "quotactl": 60, "utimensat": 88, "unshare": 97, "kexec_load": 104, "init_module": 105,
    "delete_module": 106, "clock_settime": 112, "ptrace": 117, "sched_setscheduler": 119,
    "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "setpriority": 140,
    "reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "adjtimex": 171,
    "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "socket": 198, "connect": 203,
    "add_key": 217, "request_key": 218, "keyctl": 219, "execve": 221, "swapon": 224,
    "swapoff": 225, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "fanotify_init": 262,
    "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270,
    "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "memfd_create": 279, "bpf": 280,
    "execveat": 281, "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip
MACHINES = {
    "x86_64": (0xC000003E, X86_64, {"clone": 56, "prlimit64": 302, "open": 2, "openat": 257}),
    "aarch64": (0xC00000B7, AARCH64, {"clone": 220, "prlimit64": 261, "openat": 56}),
}
"""AUDIT_ARCH, calls that are denied, and calls whose arguments are checked."""
UNSEEN = {"clone3": 435, "openat2": 437}
"""Calls whose flags a filter cannot see; if they seem to be missing, libc uses the older ones."""
LANDLOCK = {"create": 444, "add_rule": 445, "restrict": 446}
READ_ONLY = (1 << 2) | (1 << 3)
"""LANDLOCK_ACCESS_FS_READ_FILE and READ_DIR."""
OTHER_ACCESS = {1: (1 << 1) | (0x1FF << 4), 2: 1 << 13, 3: 1 << 14}
"""Version of Landlock to what it can also deny: write, remove, make; refer; truncate."""


def main() -> None:
    """Read the request, confine this process, run, report."""
    request = json.load(sys.stdin.buffer)
    report, token = int(sys.argv[1]), request["token"]
    write, leave, clock = os.write, os._exit, signal.setitimer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    clock(signal.ITIMER_REAL, request["seconds"] + 5.0)
    if request["inputs"]:
        lacking, steps = confinable(request["readable"]), programs(request)
    else:
        limit(request["seconds"], request["memory"])
        lacking, steps = confine(request["readable"]), run(request)
    if lacking and not request["unconfined"]:
        write(report, f"{token} confine {json.dumps(lacking)}\n".encode())
        leave(0)
    if lacking and not request["inputs"]:  # else seccomp denies processes, and lets threads through
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    for step, problem in steps:
        write(report, f"{token} {step} {json.dumps(problem)}\n".encode())
    write(report, f"{token} {END} {json.dumps(lacking)}\n".encode())
    leave(0)


def programs(request: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """For each input what the program prints, and its problem, which is empty if there is none."""
    yield "load", None
    for number, (text, most) in enumerate(zip(request["inputs"], request["sizes"])):  # noqa: B905
        given = input_file(text.encode("utf-8", "surrogatepass"))
        (out, output), (err, errors) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            for here, place in ((given, 0), (output, 1), (errors, 2)):
                os.dup2(here, place)
            os.closerange(3, 4096)  # the report, too
            become(request)
        for here in (given, output, errors):
            os.close(here)
        printed, problem = collect(child, out, err, most)
        os.close(out)
        os.close(err)
        text = "" if problem else printed.decode("utf-8", "replace")
        yield str(number), {"output": text, "why": problem}


def input_file(data: bytes) -> int:
    """A file without a name, at its beginning."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("input")
    else:
        file = os.open("input", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink("input")
    while data:
        data = data[os.write(file, data) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def become(request: dict[str, Any]) -> None:
    """Confine this process and run the code as the main program; ends with the interpreter."""
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5.0)
    limit(request["seconds"], request["memory"])
    if confine(request["readable"]):
        if not request["unconfined"]:
            os._exit(1)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = "w" if number else "r"
        stream = os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    for source in (*request["setup"], request["code"]):
        exec(compile(source, "main.py", "exec", dont_inherit=True), module.__dict__)
    sys.exit(0)


def collect(child: int, out: int, err: int, most: int) -> tuple[bytes, str]:
    """What a child prints, and why it failed; it is gone, and what it started may not be.

    Args:
        out: its standard output.
        most: bytes of that.
    """
    printed, said, left, status = bytearray(), b"", {out, err}, None
    while left:
        ready = select.select(list(left), [], [], 0.1)[0]
        for place in ready:
            chunk = os.read(place, 1 << 16)
            if not chunk:
                left.discard(place)
            elif place == out:
                printed += chunk
            else:
                said = (said + chunk)[-ERROR_BYTES:]
        if len(printed) > most:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return b"", f"printed more than {most} bytes"
        if not ready:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:  # and what it started keeps the pipes open
                break
            status = None
    if status is None:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return b"", f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    if not code:
        return bytes(printed), ""
    last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return b"", (last or f"exit {code}")[:LONGEST_MESSAGE]


def confinable(readable: list[str]) -> str | None:
    """What `confine` returns in a child, so that this process can still make children."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, (confine(readable) or "confined").encode())
        os._exit(0)
    os.close(writes)
    said = os.read(reads, 1000).decode()
    os.close(reads)
    os.waitpid(child, 0)
    return None if said == "confined" else said or "the trial failed"


def run(request: dict[str, Any]) -> Iterable[tuple[str, str | None]]:
    """Each step and its problem: `load`, then the tests by their number."""
    module = types.ModuleType("completion")
    sys.modules["completion"] = module
    sys.argv, names = ["completion"], module.__dict__
    if request["before"]:
        attempt(request["before"], names)  # a part of a prompt, which may be no code
    for setup in request["setup"]:
        if problem := attempt(setup, names):
            yield "load", f"in the setup: {problem}"
            return
    problem = attempt(request["code"], names)
    yield "load", problem
    if problem is None:
        for number, test in enumerate(request["tests"]):
            yield str(number), attempt(test, names)


def attempt(source: str, names: dict[str, Any]) -> str | None:
    """Run source; returns the problem, or None."""
    try:
        exec(compile(source, "<completion>", "exec", dont_inherit=True), names)
    except BaseException as error:
        try:
            said = str(error)[:LONGEST_MESSAGE]
        except BaseException:
            said = ""
        return f"{type(error).__name__}: {said}".rstrip(": ")[:LONGEST_MESSAGE]
    return None


def limit(seconds: float, memory: int) -> None:
    """Set system limits on this process; raising them again needs privilege."""
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_AS, memory),
    ):
        # Some systems lack a limit, and none may be raised above the hard one.
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(name, (value, value))
        except (OSError, ValueError):
            continue


def confine(readable: list[str]) -> str | None:
    """Deny this process files, network and other processes; returns what cannot be denied."""
    machine = MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        return f"{sys.platform} on {platform.machine()} is not supported"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return "no_new_privs is not permitted"
    if not confine_files(libc, readable):
        return "the kernel has no Landlock, or does not permit it"
    return None if confine_calls(libc, *machine) else "seccomp is not permitted"


def confine_files(libc: Any, readable: list[str]) -> bool:
    """Landlock: allow reading below some directories, and no writing."""
    call = libc.syscall
    version = call(LANDLOCK["create"], None, 0, 1)
    if version < 1:
        return False
    handled = READ_ONLY
    for since, rights in OTHER_ACCESS.items():
        handled |= rights if version >= since else 0
    attributes = struct.pack("=Q", handled)
    rules = call(LANDLOCK["create"], attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    for path in readable:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = READ_ONLY if os.path.isdir(path) else 1 << 2
        rule = struct.pack("=Qi", rights, opened)
        call(LANDLOCK["add_rule"], rules, 1, rule, 0)
        os.close(opened)
    done = call(LANDLOCK["restrict"], rules, 0) == 0
    os.close(rules)
    return done


def confine_calls(
    libc: Any, architecture: int, denied: dict[str, int], looked_at: dict[str, int]
) -> bool:
    """seccomp: deny processes except threads, sockets, signals to others, administration."""
    program = b""

    def add(code: int, value: int, yes: int = 0, no: int = 0) -> None:
        nonlocal program
        program += struct.pack("=HBBI", code, yes, no, value)

    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    add(load, 4)
    add(equal, architecture, 1, 0)
    add(give, KILL)
    add(load, 0)
    add(at_least, 0x40000000, 0, 1)  # the calls of x32, under other numbers
    add(give, ERRNO | ENOSYS)
    for number in (*denied.values(), *EVERYWHERE.values()):
        add(equal, number, 0, 1)
        add(give, ERRNO | EPERM)
    for number in UNSEEN.values():
        add(equal, number, 0, 1)
        add(give, ERRNO | ENOSYS)
    for name, argument, test, value, good in (
        ("clone", 0, any_bit, CLONE_THREAD, True),
        ("prlimit64", 0, equal, 0, True),  # its own limits
        ("open", 1, any_bit, O_TRUNC, False),  # which old Landlock lets through for readers
        ("openat", 2, any_bit, O_TRUNC, False),
    ):
        if name in looked_at:
            add(equal, looked_at[name], 0, 4)
            add(load, 16 + 8 * argument)
            add(test, value, *((1, 0) if good else (0, 1)))
            add(give, ERRNO | EPERM)
            add(give, ALLOW)
    add(give, ALLOW)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    )
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0


if __name__ == "__main__":
    main()
