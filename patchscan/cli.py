"""The `patchscan` command, made of the commands of every package. Each command imports what it needs when it runs, so
that the others start fast."""

import atexit
import errno
import io
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from types import FrameType
from typing import Any, NoReturn

import typer
import typer.core

from patchscan.cluster import commands as cluster_commands
from patchscan.common.console import INTERNAL_STEPS, STOP_SIGNALS, end_at_once, open_closed_streams, say, tell
from patchscan.common.errors import EXIT_BUG, EXIT_INTERRUPTED, UserError
from patchscan.common.extras import missing_library
from patchscan.common.files import DISK_FULL
from patchscan.common.proxies import bypass_for_loopback
from patchscan.dataset import commands as dataset_commands
from patchscan.evaluation import commands as evaluation_commands
from patchscan.scanning import commands as scanning_commands
from patchscan.scanning import evidence_commands
from patchscan.serving import commands as serving_commands
from patchscan.storage import commands as storage_commands
from patchscan.training import commands as training_commands

TYPER_CTRL_C = 130  # typer's exit code for Ctrl-C
# Seconds that an interrupted command has to undo what must not be left, as a model's version that is half registered.
END_AFTER_S = 10
# What a failing or far disk, or a machine short of memory or files, says of a path that is right.
MAY_PASS = frozenset((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE))
HEADINGS = ("Data", "Train", "Judge", "Serve", "Scan", "Cluster", INTERNAL_STEPS)


class GroupedCommands(typer.core.TyperGroup):
    """Help that lists the commands under headings, in the order in which a newcomer meets them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # typer's own click, which it does not export
        """Write one section for each heading: the commands whose `rich_help_panel` it is, with the first clause of
        their help."""
        for heading in HEADINGS:
            rows = [
                (name, re.split(r"[.:;]\s|\.$", command.help or "")[0])
                for name, command in self.commands.items()
                if getattr(command, "rich_help_panel", None) == heading
            ]
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    name="patchscan",
    cls=GroupedCommands,
    help="Find the images in a bucket that were made by a generator, and know how far to trust the answer.\n\n\b\n"
    "Example:\n  patchscan scan ./photos",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for package in (
    dataset_commands,
    storage_commands,
    training_commands,
    serving_commands,
    scanning_commands,
    evaluation_commands,
    evidence_commands,
    cluster_commands,
):
    package.add_to(app)


def main() -> None:
    """Run one command. A UserError ends it with one line on standard error and the error's exit code, a path that the
    system does not let it use with one line and 2 (EXIT_INTERRUPTED where that may pass); Ctrl-C and SIGTERM end it
    within END_AFTER_S seconds with EXIT_INTERRUPTED, unless the command has installed signal handlers of its own. Any
    other exception is a bug: its traceback is printed, and the exit code is EXIT_BUG."""
    open_closed_streams()
    for number in STOP_SIGNALS:
        # A shell script ignores Ctrl-C for the commands it runs in the background: leave it so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A key in a script that the terminal's encoding lacks is printed as \u043f rather than ending the command.
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where HOME cannot be written, and goes on
    bypass_for_loopback()
    try:
        app()
    except SystemExit as end:
        if end.code != TYPER_CTRL_C:
            raise
        _exit_interrupted()
    except Exception as error:  # noqa: BLE001  whatever it is, it is told, and has its exit code
        if end_at_once in map(signal.getsignal, STOP_SIGNALS):
            # A library has turned KeyboardInterrupt into an error of its own, as NumPy does while it is imported.
            _exit_interrupted()
        user_error = error if isinstance(error, UserError) else None
        if _is_full_disk(error) and not (user_error and user_error.exit_code == EXIT_INTERRUPTED):
            places = f"where it writes to or in {_temporary_folder()}"
            _exit_with(
                f"no space left on the disk, {places}; free some and run the same command again", EXIT_INTERRUPTED
            )
        if what_to_install := missing_library(error):
            _exit_with(what_to_install, UserError.exit_code)
        if what_failed := _unusable_path(error):
            may_pass = isinstance(error, OSError) and error.errno in MAY_PASS
            _exit_with(what_failed, EXIT_INTERRUPTED if may_pass else UserError.exit_code)
        if not user_error:
            _exit_with_traceback(error)
        _exit_with(str(user_error), user_error.exit_code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for repeated in (*STOP_SIGNALS, signal.SIGALRM):
        signal.signal(repeated, end_at_once)
    # Threads that wait for a store would keep the command for minutes.
    signal.alarm(END_AFTER_S)
    raise KeyboardInterrupt


def _exit_interrupted() -> NoReturn:
    for number in (*STOP_SIGNALS, signal.SIGALRM):
        signal.signal(number, _exit_silently)  # one line is said, however often the user presses Ctrl-C
    tell("interrupted; run the same command again")
    sys.stdout.flush()
    # sys.exit would wait for threads that are waiting for a server. The exit functions remove temporary files.
    atexit._run_exitfuncs()
    os._exit(EXIT_INTERRUPTED)


def _exit_silently(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(EXIT_INTERRUPTED)


def _exit_with(message: str, exit_code: int) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left that a SIGTERM could interrupt
    tell(" ".join(message.split()))
    sys.exit(exit_code)


def _exit_with_traceback(error: Exception) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for line in "".join(traceback.format_exception(error)).split("\n"):
        say(line, error=True)
    sys.exit(EXIT_BUG)


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # Python looks for one that it can write to
        return "the folder of temporary files"


def _unusable_path(error: Exception) -> str | None:
    """What the system says of a path that a command was given, or of a file that is gone or closed to it; None for an
    error of another kind."""
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOENT and str(error.strerror).startswith("No usable temporary directory"):
        return f"{error.strerror}: free space in one of them, or set TMPDIR to a folder that can be written to"
    if not isinstance(error.filename, (str, bytes)) or not error.strerror:
        return None
    return f"cannot use {os.fsdecode(error.filename)}: {error.strerror}"


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether the error, or one that a library turned into it, says that the disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or any(os.strerror(number) in str(error) for number in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
