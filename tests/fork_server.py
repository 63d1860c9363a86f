"""A process that has imported what `patchscan` imports, and forks a child for each command that it is told to run.

Started by tests/command.py, as a script. A child gets its command line, environment, folder, streams and session from
the test, and then runs `patchscan.cli.main` as the installed script does. Its parent is the test's process: the process
between them ends at once, and the test's process is set to inherit what such a process leaves behind.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# What most commands import. Nothing here may start a thread that a child would need, or read its settings from the
# environment when it is imported, as kubernetes does.
PRELOADED = (
    "patchscan.cli",
    "patchscan.dataset.audit",
    "patchscan.dataset.matched",
    "patchscan.detector.detector",
    "patchscan.evaluation.evaluate",
    "patchscan.scanning.report",
    "patchscan.scanning.worker",
    "patchscan.serving.archive",
    "patchscan.serving.registry",
    "patchscan.serving.serve",
    "patchscan.storage.bucket",
    "patchscan.training.train",
)
MOST_BYTES = 1 << 20
CLONE_NEWNS = 0x20000
LIBC = ctypes.CDLL(None)


def serve(channel: socket.socket) -> None:
    """Answer each request, a JSON object with three file descriptors, with a child's process id. Returns in a child,
    which has become what was asked for; ends this process when the test's process has ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    plots = sys.modules["patchscan.reporting.plots"]
    plots.DPI, plots.LAYOUT = 40, None  # type: ignore[attr-defined]  # as tests/conftest.py has it
    gc.freeze()
    while True:
        request, streams, _, _ = socket.recv_fds(channel, MOST_BYTES, 3)
        if not request:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for one in (channel.detach(), told, tell):
                    os.close(one)
                become(json.loads(request), streams)
                return
            os.write(tell, array.array("i", [child]).tobytes())
            os._exit(0)
        os.waitpid(between, 0)  # from here on the child is the test's own
        channel.send(os.read(told, 4))
        for one in (*streams, told, tell):
            os.close(one)


def become(asked: dict[str, Any], streams: list[int]) -> None:
    """Make this process what a new one with these settings would be."""
    if asked["mounts_of"]:
        with Path(f"/proc/{asked['mounts_of']}/ns/mnt").open() as mounts:
            LIBC.setns(mounts.fileno(), CLONE_NEWNS)
    for name, value in asked["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(sys.modules[module], constant, value)
    if asked["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    tempfile.tempdir = None  # which this process may have looked up
    sys.argv = asked["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    unbuffered = "PYTHONUNBUFFERED" in os.environ
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        by_line = number == 2 or unbuffered or os.isatty(number)
        errors = "backslashreplace" if number == 2 else "strict"
        text = open(number, "w", 1 if by_line else -1, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    # Processes that the command starts with multiprocessing import the module that began it.
    script = ModuleType("__main__")
    script.__file__ = sys.argv[0]
    sys.modules["__main__"] = script


def run_to_the_end(main: Callable[[], None]) -> NoReturn:
    """Run the command and end as Python does, except that modules are not taken apart: that would touch, and so copy,
    every page that this process shares with the one it was forked from."""
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001  as Python does, which prints it
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    from patchscan.cli import main

    run_to_the_end(main)
