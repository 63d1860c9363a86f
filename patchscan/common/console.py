"""Print safely to a terminal: progress as a bar or plain lines, and text of strangers. Handle Ctrl-C and SIGTERM."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from patchscan.common.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import Progress

PLAIN_INTERVAL_S = 10.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Result = TypeVar("Result")
# The heading in `patchscan --help` of commands that Jobs on a cluster run and people seldom type.
INTERNAL_STEPS = "Steps that other commands and Jobs run"


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a second Ctrl-C or SIGTERM: exit with EXIT_INTERRUPTED and wait for nothing.

    No file is left half-written: files get their names only when they are complete.
    """
    os.write(2, b"patchscan: ended at once; run the same command again\n")
    os._exit(EXIT_INTERRUPTED)


def open_closed_streams() -> None:
    """Open standard input, output and error where the caller closed them (`2>&-`): to nowhere. The files that a command
    opens would else get their numbers, and what the command or a library prints would be written into them."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Within the block, the first SIGTERM or Ctrl-C sets `stop`, for work that then saves what is done and ends; the
    second ends the process at once. After the block signals are handled as before."""

    def request_stop(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            end_at_once(number, frame)
        stop.set()

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        # A shell script ignores Ctrl-C for the commands it runs in the background: leave it so.
        if handler is not signal.SIG_IGN:
            signal.signal(number, request_stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_interruptibly(function: Callable[[], Result]) -> Result:
    """Return what the function returns, or raise what it raises; Ctrl-C and SIGTERM interrupt it at once.

    It runs in a thread, while this one waits: Python handles signals between two of its own steps, and a query of
    DuckDB is one step, of minutes. An interrupted function runs on until the process ends.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  raised again where the result is waited for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def printable(text: str) -> str:
    r"""Return text that comes from outside (a key, a path, a message about one) in a form that a terminal shows as one
    line and never obeys.

    Every character that is not printable is escaped as Python writes it: line breaks (\n, \u2028), escape sequences
    (\x1b), marks that reorder text (\u202e), lone surrogates (\udcff).
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def say(text: str, *, error: bool = False) -> None:
    """Print one line, `printable`, on standard output, or on standard error. All commands print with it."""
    write_line(printable(text), sys.stderr if error else sys.stdout)


def tell(text: str) -> None:
    """Print a line on standard error that says whose words it is, beside those of other programs."""
    say(f"patchscan: {text}", error=True)


@contextmanager
def user_errors_told() -> Iterator[None]:
    """Within the block, for a program beside the command itself, a UserError is told in one line and ends the process
    with the error's exit code."""
    try:
        yield
    except UserError as error:
        tell(" ".join(str(error).split()))
        sys.exit(error.exit_code)


def write_line(text: str, stream: TextIO) -> None:
    """Write a line at once. Where nobody reads the stream any more, as after `| head`, this line and all later ones go
    nowhere, and the work goes on."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  nothing is written to it
            os.dup2(nowhere.fileno(), stream.fileno())


def say_table(table: "pd.DataFrame", *, index: bool = True, float_format: str | None = None) -> None:
    """Print a table with the names of its rows and columns, a line for each row; nothing where there is none."""

    def cell(value: Any) -> Any:
        return printable(value) if isinstance(value, str) else value

    if table.empty:
        return
    shown = table.rename(index=cell, columns=cell).map(cell)
    for line in shown.to_string(index=index, float_format=float_format).split("\n"):
        say(line)


def sentence(text: str) -> str:
    """Return a sentence of a report for a terminal: `printable`, its no-break spaces (before `%`) as plain ones."""
    return printable(text.replace("\u00a0", " "))


class ProgressReport:
    """Show the progress of one task while in its context; call `advance` as work is done.

    Written to standard error: a bar on a terminal, elsewhere one line every ten seconds and one at the end. `total` is
    None where it is not known.
    """

    def __init__(self, task: str, total: int | None, unit: str = "images"):
        self.task, self.total, self.unit = printable(task), total, unit
        self.done = self.resumed = 0
        self.notes = ""
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                TextColumn("{task.fields[notes]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._id = self._bar.add_task(self.task, total=self.total, rate="", left="", notes="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._print_line()

    def advance(self, count: int = 1, notes: str | None = None) -> None:
        """Count `count` more as done; `notes`, where given, replaces the text after the figures."""
        self.done += count
        self.notes = self.notes if notes is None else notes
        if self._bar:
            rate, left = self._speed(time.monotonic() - self._started)
            self._bar.update(self._id, completed=self.done, rate=rate, left=left, notes=self.notes)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._print_line()

    def resume(self, count: int) -> None:
        """Count `count` as done that an earlier run did: they say nothing about this one's speed."""
        self.resumed += count
        self.advance(count)

    def _speed(self, elapsed: float) -> tuple[str, str]:
        """The rate and the time left in words, as far as they are known."""
        rate = (self.done - self.resumed) / elapsed if elapsed > 0 else 0.0
        left = ""
        if rate > 0 and self.total is not None and self.done < self.total:
            left = f"{format_duration((self.total - self.done) / rate)} left"
        # Training on a CPU takes many seconds for a batch: 0.04 must not show as 0.0.
        return f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{rate:.2g} {self.unit}/s", left

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        of = f" of {self.total:,}" if self.total is not None else ""
        parts = (f"{self.task}: {self.done:,}{of} {self.unit}", f"{elapsed:.0f} s", *self._speed(elapsed), self.notes)
        say(", ".join(filter(None, parts)), error=True)


def format_duration(seconds: float) -> str:
    """Return a time in the two largest of its units: `4 s`, `3 min 20 s`, `2 h 5 min`, `4 d 3 h`."""
    whole = round(seconds)
    for size, name, smaller_size, smaller in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"
