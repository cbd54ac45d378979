"""Programs that a policy might write by accident or by reward: what each tries, and the statuses it may come to."""

from __future__ import annotations

from typing import Final

OK, BAD, SLOW = ("ok",), ("error", "memory"), ("timeout",)
ANY = ("ok", "error", "memory", "timeout")

FORKS = "import os\nwhile True:\n    os.fork()"
GONE = "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ESCAPED = "print('ESC' + 'APED')"
"""Printed by a program that got what it tried."""

PROGRAMS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    # Processes
    "fork bomb": (FORKS, ANY),
    "fork bomb that ignores errors": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", SLOW),
    "threads without end": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", ANY),
    "exit": ("import os\nos._exit(0)", OK),
    "exit with a code": ("import os\nos._exit(7)", BAD),
    "sys.exit": ("import sys\nsys.exit(3)", BAD),
    "quit": ("raise SystemExit", OK),
    "keyboard interrupt": ("raise KeyboardInterrupt", BAD),
    "abort": ("import os\nos.abort()", BAD),
    "kill itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nprint('first of its namespace')", ANY),
    "kill the parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", ANY),
    "kill the parent's group": ("import os, signal\nos.killpg(os.getpgid(os.getppid()), signal.SIGKILL)", ANY),
    "kill its group": ("import os, signal\nos.kill(0, signal.SIGKILL)", ("ok",)),
    "kill every process": ("import os, signal\nos.kill(-1, signal.SIGKILL)", ANY),
    "stop itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(99)", SLOW),
    "ignore all signals": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(99)",
        SLOW,
    ),
    "daemon that outlives it": (GONE + "        import time\n        time.sleep(99)", ANY),
    "daemon that keeps the output open": (GONE + "        import time\n        time.sleep(99)\nimport os\nos._exit(0)", ANY),
    "daemon that writes later": (GONE + "        import time\n        time.sleep(1)\n        open('/scratch/late', 'w')", ANY),
    "subprocess": ("import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'id'], capture_output=True).stdout)", BAD),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 99'])", BAD),
    "execute Python": ("import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(1)'])", BAD),
    "multiprocessing": ("import multiprocessing\nmultiprocessing.Pool(64).map(abs, range(99))", ANY),
    # Time
    "endless loop": ("while True: pass", SLOW),
    "sleep": ("import time\ntime.sleep(99)", SLOW),
    "catastrophic pattern": ("import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", SLOW),
    "large power": ("9 ** 9 ** 9 ** 9", ANY),
    "large number as text": ("print(10 ** 5000)", BAD),
    "catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", SLOW),
    "waits for input": ("print(repr(input()))", BAD),
    "reads all input": ("import sys\nprint(repr(sys.stdin.read()))", OK),
    # Memory
    "large text": ("'a' * 10 ** 11", ("memory",)),
    "list without end": ("x = []\nwhile True: x.append(' ' * 10 ** 6)", ("memory",)),
    "memory that is caught": (
        "while True:\n    try:\n        x = []\n        while True: x.append(' ' * 10 ** 6)\n    except MemoryError: pass",
        (*SLOW, "memory"),
    ),
    "deep recursion": ("def f(): return f()\nf()", BAD),
    "deep recursion without limit": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()", ANY),
    "deep nesting": ("(" * 10 ** 5 + ")" * 10 ** 5, BAD),
    "memory by children": (
        "import os\nfor _ in range(8): os.fork()\nx = []\nwhile True: x.append(' ' * 10 ** 6)",
        ANY,
    ),
    # Output
    "output without end": ("while True: print('x' * 1000)", BAD),
    "one long line": ("print('x' * 10 ** 7)", BAD),
    "broken text": (r"import os" + "\n" + r"os.write(1, b'\xff\xfe\x00\xc3')", OK),
    "surrogates": (r"print('\ud800')", BAD),
    "control characters": (r"print('\x1b[2J\x00\x07')", OK),
    "special tokens": ("print('<|endoftext|></s><pad>')", OK),
    "an error of 10 MB": ("raise ValueError('x' * 10 ** 7)", BAD),
    "an error whose text raises": ("class E(Exception):\n    def __str__(self): raise E\nraise E", BAD),
    "a value whose repr raises": ("class E:\n    def __repr__(self): raise ValueError\nE()", BAD),
    "closed output": ("import os\nos.close(1)\nos.close(2)\nprint(1)", ANY),
    "all files closed": ("import os\nos.closerange(0, 1024)\nwhile True: pass", ANY),
    "other files": (
        "import os\nfor n in range(3, 1024):\n    try: os.write(n, b'x')\n    except OSError: continue\n    " + ESCAPED,
        OK,
    ),
    # Files
    "passwords": ("print(open('/etc/passwd').read()); " + ESCAPED, BAD),
    "home": ("import os\nprint(os.listdir('/home')); " + ESCAPED, BAD),
    "processes": ("print(open('/proc/1/environ').read()); " + ESCAPED, BAD),
    "own memory": ("open('/proc/self/mem', 'r+b'); " + ESCAPED, BAD),
    "environment": ("import os\nif {'COHORT_ROOT', 'PATH', 'HOME', 'USER'} & {*os.environ}: " + ESCAPED, OK),
    "write to Python": ("import json\nopen(json.__file__, 'a').write('x'); " + ESCAPED, BAD),
    "write outside": ("open('/written', 'w'); " + ESCAPED, BAD),
    "remove everything": ("import shutil\nshutil.rmtree('/usr'); " + ESCAPED, BAD),
    "a large file": ("open('f', 'wb').write(b'x' * 10 ** 9); " + ESCAPED, BAD),
    "many files": ("for n in range(10 ** 5): open(f'f{n}', 'w').close()\n" + ESCAPED, BAD),
    "link out of the scratch folder": ("import os\nos.symlink('/etc/passwd', 'p')\nprint(open('p').read()); " + ESCAPED, BAD),
    "shared memory": (
        "from multiprocessing import shared_memory as m\nm.SharedMemory(create=True, size=10 ** 9); " + ESCAPED,
        BAD,
    ),
    "disks": ("open('/dev/vda', 'rb').read(1); " + ESCAPED, BAD),
    "make a device": ("import os, stat\nos.mknod('d', stat.S_IFBLK | 0o600, os.makedev(254, 0)); " + ESCAPED, BAD),
    # Leaving
    "sockets": ("import socket\nsocket.create_connection(('127.0.0.1', 22), 1); " + ESCAPED, BAD),
    "sockets of virtual machines": (
        "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n" + ESCAPED,
        BAD,
    ),
    "shared memory of System V": (LIBC + "assert libc.shmget(0, 10 ** 8, 0o1600) >= 0\n" + ESCAPED, BAD),
    "keys of the kernel": (LIBC + "assert libc.syscall(250, 0, -3, 1) >= 0\n" + ESCAPED, BAD),
    "names": ("import socket\nsocket.getaddrinfo('example.org', 80); " + ESCAPED, BAD),
    "mount": (LIBC + "assert libc.mount(b'none', b'/', None, 32, None) == 0\n" + ESCAPED, BAD),
    "namespaces": (LIBC + "assert libc.unshare(0x10000000) == 0\n" + ESCAPED, BAD),
    "change of root": ("import os\nos.chroot('/scratch'); " + ESCAPED, BAD),
    "change of user": ("import os\nos.setuid(1000); " + ESCAPED, BAD),
    "trace the parent": (LIBC + "import os\nassert libc.ptrace(16, os.getppid() or 1, 0, 0) == 0\n" + ESCAPED, BAD),
    "wild pointer": ("import ctypes\nctypes.string_at(0)", BAD),
    "host name": (LIBC + "assert libc.sethostname(b'x', 1) == 0\n" + ESCAPED, BAD),
    "higher limits": ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)); " + ESCAPED, BAD),
    "clock": ("import time\ntime.clock_settime(time.CLOCK_REALTIME, 0.0); " + ESCAPED, BAD),
}  # fmt: skip
