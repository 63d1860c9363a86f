"""Decode images in child processes: one on which a decoder crashes, hangs or takes all memory costs nothing but its own
answer. It is `decoder_died`, and the next image gets a new child.

A child limits itself: the kernel ends it with SIGALRM after its time, and refuses it memory beyond what the image's
header announces. So nothing has to watch it, and it outlives its parent by no more than its time.
"""

import contextlib
import gc
import os
import queue
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.common.memory import available_memory
from patchscan.common.processes import available_cpus
from patchscan.detector.images import ErrorCode, ImageError, Limits, decoded_bytes, may_lack_memory
from patchscan.detector.prepared import Prepared, prepare
from patchscan.detector.presets import Preset

# Seconds for one image; the largest takes five on an idle machine.
TIME_S = 120.0
# Bytes that a child may take beyond those that an image's header announces: its own, and the stacks of threads.
SPARE_MEMORY = 192 * 2**20
# For an image that needs less, nobody is asked how much memory is left.
SMALL_IMAGE = 4 * 2**20
# The kernel, short of memory, or an operator may end a child that did nothing wrong, so an image is tried twice.
TRIES = 2
# glibc is to keep up to 32 MB of freed memory, as it does by itself after an image of 16 MB: small ones alone are else
# given new pages each time, which is a quarter of a child's time. All of it, as the model's process keeps (the first
# variable), would count as the next image's.
MODEL_VARIABLES = ("MALLOC_MMAP_MAX_",)
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(16 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20)}
# There is a child for each core already, and BLAS's threads wait by spinning: an image took 80 ms of a core, not 10.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
START = "import sys; sys.path.insert(0, sys.argv[1]); from patchscan.detector import decoders; decoders.run_child()"

Result = TypeVar("Result")
# What a child does with an encoded image: a function at the top level of a module, or a partial of one.
Work = Callable[[bytes, Limits], Any]
# Waits for this many bytes of memory, and holds them while it is entered.
Hold = Callable[[int], AbstractContextManager[None]]


def hold_nothing(needed: int) -> AbstractContextManager[None]:
    """A `Hold` without a limit."""
    return nullcontext()


class NoDecoderError(UserError):
    """The child processes cannot start: no image is at fault, and finished work is kept."""

    exit_code = EXIT_INTERRUPTED


class BusyError(Exception):
    """There was no time left for an image, because of others before it; trying again may help."""

    code = "busy"

    def __init__(self) -> None:
        super().__init__("other images took too long; try again")


class DecoderPool:
    """At most `most` child processes that decode, each started when it is first needed. Safe to use from many threads;
    a call beyond `most` waits."""

    def __init__(self, most: int):
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        self._started: list[_Child] = []
        for _ in range(most):
            self._idle.put(None)

    def prepare(
        self,
        data: bytes,
        preset: Preset,
        limits: Limits = Limits(),
        hold: Hold = hold_nothing,
        time_s: float | None = None,
    ) -> Prepared:
        """Decode one encoded image and choose its crops, as `prepared.prepare` does, within `time_s` (default: TIME_S)
        seconds. A large image is decoded while `hold` holds the memory for it. Raises ImageError, also
        `decoder_died`, and NoDecoderError where no child can start."""
        prepared = self.run(partial(_prepare, preset), data, limits, hold, time_s)
        assert isinstance(prepared, Prepared)
        return prepared

    def start_first(self) -> None:
        """Start a child, unless there is one, so that the first image need not wait for it."""
        child = self._idle.get()
        self._idle.put(child or self._start())

    def decoded_bytes(self, data: bytes, limits: Limits = Limits()) -> int:
        """Return the memory in bytes that decoding needs, as `images.decoded_bytes` does; 0 also where the decoder
        dies."""
        try:
            needed = self.run(None, data, limits)
        except ImageError:
            return 0
        assert isinstance(needed, int)
        return needed

    def cpu_s(self) -> float:
        """Return the CPU seconds that the children which run now have used."""
        return sum(child.cpu_s() for child in self._started)

    def _start(self) -> "_Child":
        child = _Child()
        self._started = [one for one in self._started if one.runs()] + [child]
        return child

    def run(
        self,
        work: Work | None,
        data: bytes,
        limits: Limits = Limits(),
        hold: Hold = hold_nothing,
        time_s: float | None = None,
        memory: int | None = None,
    ) -> Any:
        """Return what `work` makes of one encoded image in a child, or, without it, the bytes of memory that decoding
        needs. Time, memory and errors are as `prepare` says; what else `work` raises comes as a DecoderBugError.
        `memory`: the bytes that `work` needs, where it is not to decode the pixels."""
        for tries_left in reversed(range(TRIES)):
            child, kept = self._idle.get(), None
            try:
                child = child or self._start()
                reply = child.ask(work, data, limits, hold, time_s or TIME_S, memory)
                kept = child
            except _ChildDiedError as error:
                if error.final or not tries_left:
                    raise _died(str(error)) from None
                continue
            finally:
                if child and not kept:
                    child.end()
                self._idle.put(kept)
            if isinstance(reply, Exception):
                raise reply
            return reply
        raise AssertionError("unreachable")


@cache
def decoder_pool() -> DecoderPool:
    """Return this process's children, one for each CPU that it may use."""
    return DecoderPool(available_cpus())


class _ChildDiedError(Exception):
    """The child ended in the middle of an image; `final`: it would do so again."""

    def __init__(self, status: int, time_s: float):
        self.final = status == -signal.SIGALRM
        if self.final:
            super().__init__(f"decoding it took more than {time_s:.0f} s")
        elif status == -signal.SIGKILL:
            super().__init__("the decoder was killed, probably for the memory that it took")
        elif status < 0:
            super().__init__(f"the decoder crashed ({signal.Signals(-status).name})")
        else:
            super().__init__(f"the decoder ended with code {status}")


class _Child:
    """A child process, as its parent sees it."""

    def __init__(self) -> None:
        self._started = False
        self._pipe, theirs = Pipe()
        package = Path(__file__).parents[2]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(package), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in MODEL_VARIABLES}
                | ONE_THREAD
                | KEPT_MEMORY,
                start_new_session=True,  # Ctrl-C is for the parent
            )

    def ask(self, work: Work | None, data: bytes, limits: Limits, hold: Hold, time_s: float, memory: int | None) -> Any:
        """Return what the child makes of an image: without `work` only the memory that it needs, in bytes. An
        exception that it raised is returned. Raises _ChildDiedError, and NoDecoderError where it could not start."""
        try:
            if not self._started:
                self._pipe.recv()
                self._started = True
            self._pipe.send((work, limits, time_s, memory))
            self._pipe.send_bytes(data)
            reply = self._pipe.recv()
            if work is not None and isinstance(reply, int):
                with hold(reply):
                    self._pipe.send(None)
                    reply = self._pipe.recv()
            return reply
        except (EOFError, OSError):
            self._pipe.close()
            status = self._process.wait()
            if status > 0 and not self._started:  # no image is at fault: the next ones would fare the same
                raise NoDecoderError(
                    f"the processes that decode images cannot start (code {status}): was patchscan's installation "
                    "changed meanwhile? Run the same command again"
                ) from None
            raise _ChildDiedError(status, time_s) from None

    def runs(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def cpu_s(self) -> float:
        """Return the CPU seconds that the process has used; 0 where it has ended."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime: proc(5)

    def end(self) -> None:
        """End the process, if it still runs."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def run_child() -> None:
    """Decode what comes over the pipe whose number is the last argument, until it is closed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a thread of the parent may have blocked signals
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory is short, the kernel is to end this process and not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    own = _memory_of_process()
    with Connection(int(sys.argv[2])) as pipe, contextlib.suppress(EOFError, OSError):
        pipe.send(None)  # all that it needs is imported
        gc.freeze()
        while True:
            before = _memory_of_process()
            work, limits, time_s, memory = pipe.recv()
            own += _memory_of_process() - before  # of the modules that `work` needs
            image = _Image(pipe.recv_bytes(), limits, time_s, own)
            needed = image.limited(SPARE_MEMORY, image.reckon) if memory is None else memory
            if work is None or not isinstance(needed, int):
                pipe.send(needed)
                continue
            if needed > SMALL_IMAGE:
                pipe.send(needed)
                pipe.recv()  # the parent holds the memory now
            pipe.send(image.decode(work, needed))
            if needed > SMALL_IMAGE:
                gc.collect()  # what a decoder raised holds the pixels in a circle: they would count as the next image's


class DecoderBugError(Exception):
    """A bug of patchscan came up in a child process; the message is its traceback."""


@dataclass(frozen=True)
class _Image:
    """An encoded image in the child, and what may be spent on it; `own` is the memory of the process without it."""

    data: bytes
    limits: Limits
    time_s: float
    own: int

    def reckon(self) -> int:
        return decoded_bytes(self.data, self.limits)

    def decode(self, work: Work, needed: int) -> Any:
        most = needed + SPARE_MEMORY
        if needed <= SMALL_IMAGE:
            return self.limited(most, lambda: work(self.data, self.limits))
        left = available_memory()
        if needed > left:
            megabytes = f"{needed / 2**20:,.0f} MB"
            return _died(f"decoding it takes about {megabytes} of memory, more than there is")
        result = self.limited(min(most, left), lambda: work(self.data, self.limits))
        code = result.code if isinstance(result, ImageError) else None
        if code == ErrorCode.DECODER_DIED or (code == ErrorCode.TRUNCATED and may_lack_memory(self.data)):
            # Decoders differ in what they hold: it may be more than is reckoned.
            gc.collect()  # what the first try raised may hold its pixels
            return self.limited(min(most + needed, left), lambda: work(self.data, self.limits))
        return result

    def limited(self, memory: int, function: Callable[[], Result]) -> Result | Exception:
        """Call the function within `time_s` seconds and `memory` bytes more than the process's own; an exception is
        returned."""
        too_much = f"decoding it takes more than {memory / 2**20:,.0f} MB of memory"
        # Of all memory that a process may map, RLIMIT_DATA counts that which it can fill.
        resource.setrlimit(resource.RLIMIT_DATA, (self.own + memory, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, self.time_s)
        try:
            return function()
        except MemoryError:
            return _died(too_much)
        except ImageError as error:
            cause = error.__cause__
            if isinstance(cause, MemoryError) or "out of memory" in str(cause).lower():
                return _died(too_much)
            return ImageError(error.code, error.message)
        except Exception:  # noqa: BLE001  the parent raises it
            return DecoderBugError(traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _prepare(preset: Preset, data: bytes, limits: Limits) -> Prepared:
    return prepare(data, preset, limits)


def _died(why: str) -> ImageError:
    return ImageError(ErrorCode.DECODER_DIED, why)


def _memory_of_process() -> int:
    """The bytes of this process that RLIMIT_DATA counts."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
