"""What a process may still ask of the kernel when it runs a program that a model wrote: memory, clocks, its open files.

A filter of system calls (seccomp) names what is allowed and refuses the rest, also to native code: no process or
thread is started, nothing is opened by name, no socket is made, no signal is sent or ignored, no limit is lifted. It
needs no privilege, and nothing takes it off again.

Three calls that do no harm at first sight are refused on purpose: rt_sigreturn, which sets the mask of blocked signals
(SIGALRM among them) to whatever lies on the stack; madvise, which takes pages from the machine where root asks; and
close, so that whoever holds the other end of a socket learns by its end that the process is gone.

Linux on x86-64 and 64-bit ARM only. Left out on purpose: namespaces and Landlock, which many machines do not grant to
unprivileged users; with nothing to open and nothing to connect they would hide what cannot be reached anyway.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

from trb.errors import OperationError

__all__ = ["adopt_orphans", "die_with_parent", "forbid_system_calls", "why_not_confined"]

# By machine: what the kernel calls it (AUDIT_ARCH_*), and its numbers of the calls that are allowed.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            **{"read": 0, "write": 1, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11},
            **{"brk": 12, "sched_yield": 24, "mremap": 25, "nanosleep": 35},
            **{"getpid": 39, "exit": 60, "gettimeofday": 96, "getrusage": 98, "times": 100, "getuid": 102},
            **{"getgid": 104, "geteuid": 107, "getegid": 108, "gettid": 186, "time": 201, "futex": 202},
            **{"restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230},
            **{"exit_group": 231, "getrandom": 318},
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            **{"lseek": 62, "read": 63, "write": 64, "fstat": 80, "exit": 93, "exit_group": 94},
            **{"futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115},
            **{"sched_yield": 124, "restart_syscall": 128, "times": 153, "getrusage": 165},
            **{"gettimeofday": 169, "getpid": 172, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177},
            **{"gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226},
            **{"getrandom": 278},
        },
    ),
}

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # of the classic Berkeley packet filter
_OFFSET_OF_NUMBER, _OFFSET_OF_MACHINE = 0, 4  # in struct seccomp_data


def why_not_confined() -> str:
    """Why programs cannot be confined on this system; "" where they can, as far as its name tells."""
    if not sys.platform.startswith("linux"):
        return f"system calls are filtered on Linux only, and this is {sys.platform}"
    if platform.machine() not in _CALLS:
        return f"system calls are filtered on {' and '.join(_CALLS)} only, and this is {platform.machine()}"
    return ""


def forbid_system_calls() -> None:
    """Refuse this process, for good, every system call that is not allowed: it fails with EPERM.

    Raises OperationError where the kernel sets no such filter.
    """
    _control(_SET_DUMPABLE, 0)  # no core files, and no debugger of the same user
    _control(_SET_NO_NEW_PRIVS, 1)
    steps = _filter()
    instructions = ctypes.create_string_buffer(steps)
    head = struct.pack("HP", len(steps) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    program = ctypes.create_string_buffer(head)
    _control(_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def die_with_parent(parent: int, signal: int) -> None:
    """Have the kernel send this process a signal when its parent, of that id, ends; ends it if that was before."""
    _control(_SET_PDEATHSIG, signal)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, as no other process may be there to bury it."""
    _control(_SET_CHILD_SUBREAPER, 1)


def _filter() -> bytes:
    machine, calls = _CALLS[platform.machine()]
    steps = [
        (_LOAD_WORD, 0, 0, _OFFSET_OF_MACHINE),
        (_JUMP_IF_EQUAL, 1, 0, machine),
        (_RETURN, 0, 0, _KILL_PROCESS),  # the calls of another machine have other numbers
        (_LOAD_WORD, 0, 0, _OFFSET_OF_NUMBER),
        *((_JUMP_IF_EQUAL, len(calls) - place, 0, number) for place, number in enumerate(calls.values())),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _control(option: int, value: int, pointer: int = 0) -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(option, value, pointer, 0, 0):
        raise OperationError(f"the kernel refuses prctl({option}): {os.strerror(ctypes.get_errno())}")
