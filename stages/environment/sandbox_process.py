"""The sandbox's process: answers requests on its standard input, one fresh process for each program. Imports nothing of ours.

It leaves the system behind first (`_leave`): user, mount, network, IPC and host name namespaces of its own, a root in which
there is Python, read-only, and nothing else, and a filter of system calls (`_forbid`). A program runs in a child that is the
first process of a PID namespace, with an empty scratch folder, without capabilities, within limits; whatever it starts dies
with it.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import json
import math
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import traceback

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNT, _NEW_UTS, _NEW_IPC = 0x20000, 0x4000000, 0x8000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEV, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_FORBIDDEN = {
    "x86_64": (0xC000003E, 41, (29, 64, 68, 101, 248, 249, 250, 298, 321, 323, 425)),
    "aarch64": (0xC00000B7, 198, (194, 190, 186, 117, 217, 218, 219, 241, 280, 282, 425)),
}
"""Of a machine: its number for the kernel, `socket`, and shmget, semget, msgget, ptrace, add_key, request_key, keyctl,
perf_event_open, bpf, userfaultfd, io_uring_setup: what no namespace and no limit holds."""
_DEATH_SIGNAL, _FILTER_CALLS, _DROP_BOUNDING, _NO_NEW_PRIVILEGES = 1, 22, 24, 38
_CAPABILITY_VERSION = 0x20080522
_NOBODY = 65534
_ROOT = "/tmp"
"""Where the new root is put together; nothing of the old one stays visible."""
_SCRATCH = "/scratch"
_SCRATCH_BYTES = 16 * 2**20
_PROCESSES = 24
_OUTPUT_BYTES = 2**20
"""What a program may print; at more it is ended."""
_EXIT_ERROR, _EXIT_MEMORY = 90, 91


def main() -> None:
    """Answer requests until there are none: a length and JSON each, as is the reply."""
    isolated = sys.argv[1] == "namespaces"
    try:
        if isolated:
            _leave([*sys.argv[2:]])
        _reply({"ready": True})
    except OSError as error:
        _reply({"ready": False, "detail": str(error)})
        return
    while (head := sys.stdin.buffer.read(4)) and len(head) == 4:
        request = json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))
        supervisor = os.fork()
        if not supervisor:
            _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)
            try:
                _reply(_supervise(request, isolated=isolated))
            finally:
                os._exit(0)
        os.waitpid(supervisor, 0)


def _reply(answer: dict[str, object]) -> None:
    written = json.dumps(answer).encode()
    os.write(1, struct.pack("<I", len(written)) + written)


# ------------------------------------------------------------------------------------------------ the world it runs in


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    coded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(_LIBC.mount(coded[0], coded[1], coded[2], ctypes.c_ulong(flags), coded[3]), f"mount {target}")


def _leave(shown: list[str]) -> None:
    """Enter namespaces, with a root that has the folders `shown`, read-only, devices without state, and a scratch folder."""
    if (machine := os.uname().machine) not in _PIVOT_ROOT:
        raise OSError(f"expected a machine of {' or '.join(_PIVOT_ROOT)}, found {machine}")
    _enter_namespaces()
    # In the new mount namespace and still as the user outside, who alone may be allowed to walk to some folders.
    opened = {path: os.open(path, os.O_PATH) for path in shown if os.path.exists(path)}
    devices = {path: os.open(path, os.O_PATH) for path in ("/dev/null", "/dev/zero", "/dev/urandom")}
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as limit:
        limit.write("0")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", _ROOT, "tmpfs", _NO_SUID | _NO_DEV, "size=1m,mode=755")
    for path, number in opened.items():
        os.makedirs(_ROOT + path, exist_ok=True)
        _mount(f"/proc/self/fd/{number}", _ROOT + path, None, _BIND | _RECURSIVE)
        _make_read_only(_ROOT + path)
    os.makedirs(_ROOT + "/dev")
    for path, number in devices.items():
        os.close(os.open(_ROOT + path, os.O_CREAT | os.O_WRONLY))
        _mount(f"/proc/self/fd/{number}", _ROOT + path, None, _BIND)
    os.makedirs(_ROOT + _SCRATCH)
    os.makedirs(_ROOT + "/old")
    for number in [*opened.values(), *devices.values()]:
        os.close(number)
    _check(_LIBC.syscall(_PIVOT_ROOT[machine], _ROOT.encode(), (_ROOT + "/old").encode()), "pivot_root")
    os.chdir("/")
    _check(_LIBC.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    _mount("none", "/", None, _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEV)
    _forbid()


def _make_read_only(path: str) -> None:
    """Make a mount read-only, with all that is mounted below it; kernels before 5.12 cannot do that at once."""
    recursive, here, changes = 0x8000, -100, struct.pack("<QQQQ", _READ_ONLY | _NO_SUID | _NO_DEV, 0, 0, 0)
    numbers = [ctypes.c_long(number) for number in (_MOUNT_SETATTR, here, recursive, len(changes))]
    if not _LIBC.syscall(*numbers[:2], path.encode(), numbers[2], changes, numbers[3]):
        return
    if ctypes.get_errno() != errno.ENOSYS:
        _check(-1, f"read-only {path}")
    with open("/proc/self/mountinfo") as mounts:
        below = [line.split()[4] for line in mounts if line.split()[4].startswith(path + "/")]
    if below:
        raise OSError(f"expected nothing mounted below the folders of Python on a kernel before 5.12, found {below[0]}")
    _mount("none", path, None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEV)


def _forbid() -> None:
    """Let forbidden system calls fail from now on, here and in every child, as do sockets other than those of Unix."""
    machine, socket, calls = _FORBIDDEN[os.uname().machine]
    load, equal, at_least, answer, allow, fail = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x00050001
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, fail), (load, 0, 0, 0)]
    for code, number in [(at_least, 0x40000000), *((equal, call) for call in calls)]:
        steps += [(code, 0, 1, number), (answer, 0, 0, fail)]
    steps += [(equal, 1, 0, socket), (answer, 0, 0, allow), (load, 0, 0, 16), (equal, 0, 1, 1), (answer, 0, 0, allow)]
    filters = ctypes.create_string_buffer(
        b"".join(struct.pack("<HBBI", *step) for step in [*steps, (answer, 0, 0, fail)])
    )
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps) + 1, ctypes.addressof(filters)))
    _check(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    _check(_LIBC.prctl(_FILTER_CALLS, 2, program, 0, 0), "seccomp")


def _enter_namespaces() -> None:
    """Enter namespaces whose root is this user outside, or the user `nobody` where this user is root.

    The system limits no number of processes of the real root. Only from outside may root be mapped to another user.
    """
    user, group, outside = os.geteuid(), os.getegid(), None
    unshared, mapped = os.pipe(), os.pipe()
    if user == 0:
        outside = os.fork()
        if not outside:
            os.read(unshared[0], 1)
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{os.getppid()}/{name}", "w") as mapping:
                    mapping.write(f"0 {_NOBODY} 1")
            os.write(mapped[1], b"1")
            os._exit(0)
    _check(_LIBC.unshare(_NEW_USER | _NEW_MOUNT | _NEW_NET | _NEW_IPC | _NEW_UTS), "unshare")
    if outside is None:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as mapping:
                mapping.write(line)
    else:
        os.write(unshared[1], b"1")
        os.read(mapped[0], 1)
        os.waitpid(outside, 0)
        os.setgroups([])
    for number in (*unshared, *mapped):
        os.close(number)


# ------------------------------------------------------------------------------------------------ one program


def _supervise(request: dict[str, object], *, isolated: bool) -> dict[str, object]:
    """Run the programs of a request in a child; return its status and what the last of them printed."""
    if isolated:
        _check(_LIBC.unshare(_NEW_PID | _NEW_MOUNT | _NEW_IPC), "unshare")
        _mount("tmpfs", _SCRATCH, "tmpfs", _NO_SUID | _NO_DEV, f"size={_SCRATCH_BYTES},nr_inodes=1024,mode=700")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            _run(request, writing, isolated=isolated)
        finally:
            os._exit(_EXIT_ERROR)
    os.close(writing)
    output, ended = _read(reading, time.monotonic() + float(str(request["deadline"])))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL) if isolated else os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {"status": _status(status, ended), "output": output.decode("utf-8", "replace")}


def _read(reading: int, end: float) -> tuple[bytes, str]:
    """Return what is printed until the child ends, prints too much (`output`), or the deadline comes (`timeout`)."""
    output = b""
    while (left := end - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        if not (part := os.read(reading, 65536)):
            return output, ""
        output += part
        if len(output) > _OUTPUT_BYTES:
            return output[:_OUTPUT_BYTES], "output"
    return output, "timeout"


def _status(status: int, ended: str) -> str:
    if ended:
        return "timeout" if ended == "timeout" else "error"
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "error"
    return {0: "ok", _EXIT_MEMORY: "memory"}.get(os.WEXITSTATUS(status), "error")


def _run(request: dict[str, object], writing: int, *, isolated: bool) -> None:
    """Become the program: limits first, then the programs before it with their output thrown away, then it."""
    os.setsid()  # a group of its own: signals to its group must not reach those outside
    if isolated:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(null, 2)
    output = os.dup2(writing, 200, inheritable=False)
    os.closerange(3, 200)
    os.closerange(201, 1024)
    if isolated:
        os.chdir(_SCRATCH)
    _limit(float(str(request["deadline"])), int(str(request["memory_mb"])))
    _drop_capabilities()
    random.seed(0)
    programs = [str(program) for program in request["programs"]]  # type: ignore[attr-defined]
    names: dict[str, object] = {"__name__": "__main__", "__builtins__": __builtins__}
    for program in programs[:-1]:
        _execute(program, names, shown=False)
    sys.stdout.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    code = _execute(programs[-1], names, shown=True)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(code)


def _limit(deadline: float, memory_mb: int) -> None:
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else contextlib.nullcontext() as statm:
        pages = int(statm.read().split()[0]) if statm else 0
    space = pages * resource.getpagesize() or 64 * 2**20
    seconds = math.ceil(deadline) + 1
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: space + memory_mb * 2**20,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: _SCRATCH_BYTES,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, amount in limits.items():
        resource.setrlimit(kind, (amount, amount))


def _drop_capabilities() -> None:
    if os.geteuid() == 0:
        resource.setrlimit(resource.RLIMIT_NPROC, (_PROCESSES, _PROCESSES))
        for number in range(64):
            if _LIBC.prctl(_DROP_BOUNDING, number, 0, 0, 0):
                break
        header = struct.pack("<II", _CAPABILITY_VERSION, 0)
        _check(_LIBC.capset(header, bytes(24)), "capset")
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _execute(program: str, names: dict[str, object], *, shown: bool) -> int:
    """Run a program as a notebook would: the value of a last expression is printed, if it is not None."""
    try:
        tree = ast.parse(program)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "program", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program", "eval"), names)
            if value is not None and shown:
                print(repr(value))
        return 0
    except SystemExit as error:
        return 0 if error.code in (None, 0) else _EXIT_ERROR
    except MemoryError:
        return _EXIT_MEMORY
    except BaseException as error:
        if shown:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                os.write(1, "".join(traceback.format_exception_only(error)).encode("utf-8", "replace")[-2000:])
        return _EXIT_ERROR


if __name__ == "__main__":
    main()
