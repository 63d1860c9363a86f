"""A process that has imported what `patchscan` imports, and forks a child for each command that it is told to run.

Started by tests/command.py, as a script. A child gets its command line, environment, folder, streams and session from
the test, and then runs `patchscan.cli.main` as the installed script does, or a module as `python -m` does. Its parent
is the test's process: the process between them ends at once, and the test's process is set to inherit what such a
process leaves behind. Commands that others start (tests/forked_command.py) come on an address of their own, and the
process between stays, to tell how the child ended.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import warnings
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
    "patchscan.training.launch",
    "patchscan.training.train",
    # What torch and the others import when they are first used, which takes seconds.
    "sklearn.compose",
    "sklearn.linear_model",
    "sklearn.metrics",
    "sklearn.model_selection",
    "statsmodels.stats.multitest",
    "torch._dynamo",
    "torch.onnx",
)
MOST_BYTES = 1 << 20
CLONE_NEWNS = 0x20000
LIBC = ctypes.CDLL(None)


def serve(tests: socket.socket, others: socket.socket) -> None:
    """Answer each request, a JSON object with three file descriptors, with a child's process id. Returns in a child,
    which has become what was asked for; ends this process when the test's process has ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    import no_pictures  # type: ignore[import-not-found]  # from this script's own folder

    no_pictures.put(no_pictures.stand_ins())  # as tests/conftest.py has it
    gc.freeze()
    asker: socket.socket | None = None
    in_child = False
    while not in_child:
        ready, _, _ = select.select([tests, others], [], [])
        asker = None if tests in ready else others.accept()[0]
        request, streams, _, _ = socket.recv_fds(asker or tests, MOST_BYTES, 3)
        if not request and not asker:
            os._exit(0)
        in_child = fork_for_other(asker, streams) if asker else fork_for_test(tests)
        if not in_child:
            for one in streams:
                os.close(one)
    for channel in (tests, others, asker):
        if channel:
            channel.close()
    become(json.loads(request), streams)


def fork_for_test(tests: socket.socket) -> bool:
    """Fork a child that becomes the test's own. Returns whether this is the child."""
    told, tell = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child == 0:
            os.close(told)
            os.close(tell)
            return True
        os.write(tell, array.array("i", [child]).tobytes())
        os._exit(0)
    os.waitpid(between, 0)  # from here on the child is the test's own
    tests.send(os.read(told, 4))
    os.close(told)
    os.close(tell)
    return False


def fork_for_other(asker: socket.socket, streams: list[int]) -> bool:
    """Fork a child for tests/forked_command.py. Returns whether this is the child."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if os.fork():
        asker.close()
        return False
    child = os.fork()
    if child == 0:
        return True
    for one in streams:  # who reads them waits for the last that holds them
        os.close(one)
    asker.send(array.array("i", [child]).tobytes())
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, asker.fileno()], [], [])
    if asker.fileno() in ready:  # it was killed
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        asker.send(array.array("i", [status]).tobytes())
    os._exit(0)


def become(asked: dict[str, Any], streams: list[int]) -> None:
    """Make this process what a new one with these settings would be."""
    if asked.get("mounts_of"):
        with Path(f"/proc/{asked['mounts_of']}/ns/mnt").open() as mounts:
            LIBC.setns(mounts.fileno(), CLONE_NEWNS)
    for name, value in asked.get("constants", {}).items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(sys.modules[module], constant, value)
    if asked.get("new_session"):
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


def run_to_the_end(main: Callable[[], object]) -> NoReturn:
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


def module_of_arguments() -> Callable[[], object]:
    """What `python [-u] -m MODULE ARGUMENTS` runs, with the arguments in their place."""
    words = sys.argv[1:]
    if words[0] == "-u":
        words.pop(0)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    assert words[0] == "-m", sys.argv
    sys.argv = words[1:]
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that the module was imported here
    sys.path[0] = str(Path.cwd())
    return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def main() -> None:
    """Serve, and in each child run its command."""
    serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:3]))
    if Path(sys.argv[0]).name == "python":
        run_to_the_end(module_of_arguments())
    from patchscan.cli import main

    run_to_the_end(main)


if __name__ == "__main__":
    main()
