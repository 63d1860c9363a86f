"""What strangers wrote is printed as text, and a bug is told from "done, some failed"."""

import ast
import atexit
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import cast

import duckdb
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchscan import cli
from patchscan.common import console
from patchscan.common.console import ProgressReport, printable, run_interruptibly, say_table, stop_on_signals
from patchscan.common.errors import EXIT_BUG, UserError
from patchscan.dataset import commands
from patchscan.detector.base import BaseDetector
from patchscan.detector.images import ErrorCode, ImageError
from patchscan.evaluation.scoring import BATCH, score_images
from patchscan.scanning.report import summary_text
from tests.image_tree import picture, write

FORGED = "a\nverdicts: 0 AI\r\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj.exe\u2066\u200f\u2028b\x7f\udcff"


@given(st.text(st.characters()))
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ü 日本 🙂.jpg", "ü 日本 🙂.jpg"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egpj", r"\u202egpj"),
        ("\udcff", r"\udcff"),
    ],
)
def test_escapes_are_those_of_python(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_tables_names_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    forged = FORGED.removesuffix("\udcff")  # a table cannot hold it
    table = pd.DataFrame({"generator": [forged, "gan"], "class": ["ai", forged], "count": [1, 2]})
    say_table(table, index=False)
    say_table(table.pivot(index="generator", columns="class", values="count"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 4
    assert all(line.isprintable() for line in lines)


def test_the_index_of_a_generator_with_an_escape_sequence_in_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("ai", "nature"):
        write(tmp_path / "gan\x1b[2J" / "train" / label / "1.png", picture(1))
    commands.index(str(tmp_path))
    commands.audit(str(tmp_path))
    shown = capsys.readouterr().out
    assert shown.count(r"gan\x1b[2J") == 3
    assert all(line.isprintable() for line in shown.splitlines())


def prints(file: Path) -> list[str]:
    """What a module prints by itself, JSON apart, whose strings are escaped."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    printing = [
        call for call in calls if ast.unparse(call.func) in ("print", "typer.echo", "click.echo", "typer.secho")
    ]
    return [ast.unparse(call) for call in printing if not ast.unparse(call.args[0]).startswith("json.dumps(")]


def test_every_module_prints_with_say() -> None:
    package = Path(console.__file__).parent.parent
    found = {str(file): prints(file) for file in package.rglob("*.py") if file != Path(console.__file__)}
    assert not {file: calls for file, calls in found.items() if calls}


def test_a_scans_summary_has_as_many_lines_as_it_means_to() -> None:
    error = {"status": "rejected", "code": "empty", "n": 1, "new": 1, "examples": [{"key": FORGED, "message": FORGED}]}
    report = {
        "source": FORGED,
        "named": None,
        "evaluation": None,
        "whole": None,
        "totals": dict.fromkeys(("listed", "scored", "rejected", "failed", "unchanged", "deleted"), 1),
        "verdicts": dict.fromkeys(("ai", "uncertain", "real"), 1),
        "errors": [error],
        "alerts": [{"kind": "ai", "message": FORGED}],
        "model": {"warnings": [FORGED]},
    }
    text = summary_text(report)
    assert len(text.splitlines()) == 5
    assert all(line.isprintable() for line in text.splitlines())


def test_progress_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(FORGED, None):
        pass
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_progress_tells_the_time_left_at_the_rate_of_this_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with ProgressReport("scanning", 10_000, "objects") as progress:
        progress.resume(4_000)
        clock[0] += 100
        progress.advance(1_000, "9 MB")
    first, last = capsys.readouterr().err.splitlines()
    assert last.startswith("scanning: 5,000 of 10,000 objects, 100 s, 10.0 objects/s, 8 min 20 s left, 9 MB")
    assert first == last


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3_599, "59 min 59 s"), (7_500, "2 h 5 min"), (356_400, "4 d 3 h")],
)
def test_a_duration_has_two_units(seconds: float, said: str) -> None:
    assert console.format_duration(seconds) == said


def end_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of the command when it raises this error."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize("error", [KeyError("ETag"), ValueError(FORGED), RuntimeError("no"), AssertionError()])
def test_a_bug_prints_its_traceback_and_has_a_code_of_its_own(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error, monkeypatch) == EXIT_BUG == 70
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert type(error).__name__ in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_a_users_error_is_one_line_that_obeys_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(UserError(f"{FORGED} is missing"), monkeypatch) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("patchscan: a verdicts")
    assert shown.count("\n") == 1
    assert shown[:-1].isprintable()


@pytest.mark.parametrize(
    ("place", "why"),
    [("a file/below", "Not a directory"), ("a file", "File exists"), ("x" * 300, "File name too long")],
)
def test_a_path_that_cannot_be_used_is_one_line(
    place: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match=why) as caught:
        (tmp_path / place).mkdir()
    assert end_with(caught.value, monkeypatch) == 2
    assert capsys.readouterr().err == f"patchscan: cannot use {tmp_path / place}: {why}\n"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_a_disk_or_machine_that_fails_is_no_fault_of_the_path(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Job ends for good with 2, and is tried again with 75."""
    assert end_with(OSError(number, os.strerror(number), "/data/1.png"), monkeypatch) == 75


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ConnectionError(), OSError(9, "Bad", 7)])
def test_a_systems_error_about_no_path_is_a_bug(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_with(error, monkeypatch) == EXIT_BUG


def test_no_folder_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk, where Python finds none, and a message about it needs none."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    assert end_with(caught.value, monkeypatch) == 2
    assert "set TMPDIR to a folder that can be written to" in capsys.readouterr().err
    assert end_with(OSError(errno.ENOSPC, "No space left on device"), monkeypatch) == 75
    shown = capsys.readouterr().err
    assert shown.startswith("patchscan: no space left on the disk")
    assert shown.count("\n") == 1


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as it does in a command."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_query_of_minutes_is_interrupted_at_once(ctrl_c: None) -> None:
    database = duckdb.connect()

    def query() -> None:
        database.execute("SELECT sum(a * b) FROM range(1000000000) t(a), range(1000) u(b)", []).fetchone()

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(query)
    assert time.monotonic() - began < 5
    database.interrupt()


def test_what_runs_interruptibly_returns_and_raises_as_ever() -> None:
    assert run_interruptibly(lambda: 7) == 7
    with pytest.raises(UserError, match="wrong"):
        run_interruptibly(lambda: (_ for _ in ()).throw(UserError("wrong")))


def test_signals_stop_the_work_and_are_handled_as_before_after_it(ctrl_c: None) -> None:
    stop = threading.Event()
    with stop_on_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before, stop = signal.signal(signal.SIGINT, signal.SIG_IGN), threading.Event()
    try:
        with stop_on_signals(stop):
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command in this process may be interrupted: it ends with SystemExit, and signals are then as before."""

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_a_library_turns_into_an_error_interrupts_all_the_same(
    ending: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code, capsys.readouterr().err) == (75, "patchscan: interrupted; run the same command again\n")


def test_an_interrupted_command_does_not_wait_for_threads_that_wait(
    ending: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "END_AFTER_S", 1)
    waiting = threading.Event()

    def app() -> None:
        with ThreadPoolExecutor() as pool:
            pool.submit(waiting.wait, 60)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(cli, "app", app)
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 75
    assert time.monotonic() - began < 30
    waiting.set()


def test_an_evaluation_that_is_interrupted_prepares_no_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the batch that it prepares while it scores another."""
    read: list[str] = []

    def slowly(path: str) -> bytes:
        read.append(path)
        time.sleep(0.02)
        raise ImageError(ErrorCode.EMPTY, "no bytes")

    def interrupted(self: ProgressReport, count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressReport, "advance", interrupted)
    detector = cast(BaseDetector, SimpleNamespace(logits=list, prepare=None))
    paths = [f"{number}.png" for number in range(10 * BATCH)]
    table = pd.DataFrame({"path": paths, "generator": "one", "split": "val", "class": "ai"})
    with pytest.raises(KeyboardInterrupt):
        score_images(detector, slowly, table, "test")
    assert len(read) < 2 * BATCH


def test_work_goes_on_where_nobody_reads_what_it_says() -> None:
    """As after `| head`: an exit code of 1 would say that the scan is done."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    console.write_line("read", stream)
    assert os.read(reader, 10) == b"read\n"
    os.close(reader)
    for _ in range(2):
        console.write_line("not read", stream)
    stream.close()


def test_what_is_printed_to_closed_streams_goes_into_no_file(tmp_path: Path) -> None:
    """As of some daemons. A command ended at `sys.stderr.isatty()`, or wrote into the file that it opened as 2."""
    script = """
import os, sys
from patchscan.common.console import ProgressReport, open_closed_streams, say
open_closed_streams()
with open(sys.argv[1], "wb") as file, ProgressReport("task", 1) as progress:
    file.write(b"kept")
    os.write(2, b"a library's words")
    say("said")
    say("an error", error=True)
    assert sys.stdin.read() == ""
    assert sum(map(os.get_inheritable, range(3))) == 3 and not file.fileno() < 3
"""
    for closed in ("<&- >&- 2>&-", "2>&-", "<&- 2>&-", ">&-"):
        stdin = "" if "<" in closed else "</dev/null"
        command = [
            "sh",
            "-c",
            f'exec "$0" -c "$1" "$2" {stdin} {closed}',
            sys.executable,
            script,
            str(tmp_path / "file"),
        ]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, closed
        assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_table_without_rows_is_no_word_about_pandas(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(pd.DataFrame({"generator": []}).groupby("generator").size().to_frame())
    assert capsys.readouterr().out == ""
