"""`patchscan` as a process: started as its users start it, or, the second time a command is run, forked from a process
that has imported everything already (tests/fork_server.py), which spares each its seconds of imports.

Either way it is a process of its own with this one as its parent: exit codes, signals, streams and files are the same.
"""

import array
import atexit
import ctypes
import inspect
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

BIN = Path(sys.executable).parent
PATCHSCAN = str(BIN / "patchscan")
# Read when a process begins or a library is loaded, so a forked one would not heed them.
READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "MALLOC_", "ARROW_", "MPL")
PR_SET_CHILD_SUBREAPER = 36
DEAD_PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
LIBC = ctypes.CDLL(None, use_errno=True)
NONE: Mapping[str, object] = MappingProxyType({})

Done = subprocess.CompletedProcess[str]


def running(pid: int) -> bool:
    """Not a zombie, which waits for whoever inherited it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def environment() -> dict[str, str]:
    """This process's, with one thread a process, since the machine is shared with other tests, and behind a proxy that
    does not answer: what runs on loopback needs none."""
    kept = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return {**kept, "OMP_NUM_THREADS": "1", **DEAD_PROXY}


def start_patchscan(
    *arguments: object,
    fresh: bool = False,
    constants: Mapping[str, object] = NONE,
    mounts_of: int | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start `patchscan` with these arguments; `options` are Popen's. What it prints is text, to be read from its pipes
    where nothing else is asked.

    `fresh` asks that it is started as users do, for tests of memory or start-up. `constants` shortens waits: module
    constants by their dotted names. It sees the mounts of the process `mounts_of`. These two are always forked.
    """
    command = [PATCHSCAN, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(), **options}
    if constants or mounts_of or (not fresh and ForkServer.takes(command[1], options)):
        return _Forked(command, {"constants": dict(constants), "mounts_of": mounts_of}, **options)
    return subprocess.Popen(command, **options)


def patchscan(*arguments: object, timeout: float = 540, **options: Any) -> Done:
    """Run `patchscan` with these arguments to its end; `options` are those of `start_patchscan`."""
    with start_patchscan(*arguments, **options) as process:
        try:
            printed, told = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return Done(process.args, process.returncode, printed, told)


class ForkServer:
    """The one process that forks, started with the first command that is run a second time."""

    lock = threading.Lock()
    channel: socket.socket | None = None
    # Where it also hears tests/forked_command.py: an abstract address, which no folder holds.
    address = f"patchscan-tests-{os.getpid()}"
    ran: set[str] = set()  # noqa: RUF012
    # Where the processes of one test run note, as files, which commands they ran; None where this is the only one.
    shared: Path | None = None

    @classmethod
    def takes(cls, command: str, options: dict[str, Any]) -> bool:
        """Whether a command may be forked: it has been run once as its users run it, and nothing is asked for that is
        settled when a process begins."""
        with cls.lock:
            first = command not in cls.ran and cls.claim(command)
            cls.ran.add(command)
        known = {"stdin", "stdout", "stderr", "text", "env", "cwd", "start_new_session"}
        return not first and options.keys() <= known and settled(options["env"]) == settled(environment())

    @classmethod
    def claim(cls, command: str) -> bool:
        """Whether no other process of this test run has run a command."""
        if cls.shared is None:
            return True
        try:
            (cls.shared / command).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @classmethod
    def fork(cls, request: dict[str, Any], streams: list[int]) -> int:
        """A new child of this process that runs the command of `request`; returns its process id."""
        channel = cls.begun()
        with cls.lock:
            LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # for this moment: orphans of other commands are not ours
            try:
                socket.send_fds(channel, [json.dumps(request).encode()], streams)
                (pid,) = array.array("i", channel.recv(4))
            finally:
                LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)
            return pid

    @classmethod
    def begun(cls) -> socket.socket:
        """The way to the fork server, which is started if this is the first."""
        with cls.lock:
            if cls.channel is None:
                cls.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                others = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                others.bind(f"\0{cls.address}")
                others.listen()
                passed = [theirs.fileno(), others.fileno()]
                script = str(Path(__file__).with_name("fork_server.py"))
                command = [sys.executable, script, *map(str, passed)]
                server = subprocess.Popen(command, pass_fds=passed, env=environment())
                theirs.close()
                others.close()
                atexit.register(server.wait)
                atexit.register(cls.channel.close)
            return cls.channel


def path_of_forked(folder: Path) -> str:
    """A PATH on which `patchscan` and `python -m MODULE` are forked for whoever starts them, a script say, from the
    second time that a test run starts them so (tests/forked_command.py). Their files are written into the folder."""
    ForkServer.begun()
    started = (ForkServer.shared or folder) / "started by others"
    started.mkdir(exist_ok=True)
    words = [sys.executable, "-I", "-S", str(Path(__file__).with_name("forked_command.py")), ForkServer.address]
    for name in ("patchscan", "python"):
        line = shlex.join([*words, str(started), str(BIN / name)])
        (folder / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def settled(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that count when a process begins."""
    return {name: value for name, value in variables.items() if name.startswith(READ_AT_START)}


class _Forked(subprocess.Popen[str]):
    """A Popen whose process is forked by the fork server, with what else it is told there."""

    def __init__(self, command: list[str], more: dict[str, Any], **options: Any):
        self._more = more
        super().__init__(command, **options)

    def _execute_child(self, *arguments: Any, **named: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments, **named).arguments  # type: ignore[attr-defined]
        request = {
            "arguments": given["args"],
            "environment": given["env"],
            "cwd": os.path.abspath(given["cwd"] or "."),  # noqa: PTH100
            "new_session": given["start_new_session"],
            **self._more,
        }
        ours = {"p2cread": 0, "c2pwrite": 1, "errwrite": 2}
        streams = [given[name] if given[name] != -1 else number for name, number in ours.items()]
        self.pid = ForkServer.fork(request, streams)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]
