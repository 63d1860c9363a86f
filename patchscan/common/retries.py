"""Retry calls to stores and servers, with jittered back-off, a deadline and a stop signal."""

import random
import threading
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

from patchscan.common.console import tell
from patchscan.common.errors import EXIT_INTERRUPTED, UserError

Result = TypeVar("Result")

# The longest first wait; each further one may be twice as long, up to a limit.
FIRST_WAIT_S = 0.2
MOST_DOUBLINGS = 16
# Calls that have failed for so long are told to the user, and again at these intervals.
TELL_AFTER_S = 15.0
TELL_EVERY_S = 30.0


class TransientError(Exception):
    """The other side is busy, restarting or unreachable: the same call may soon work. `attempts` is the number of tries
    after which `Retries` gave up."""

    attempts = 1


class OutageError(UserError):
    """Nothing has worked for minutes, so the command ends. Finished work is kept, and a rerun continues from there."""

    exit_code = EXIT_INTERRUPTED


class StoppedError(Exception):
    """The work was stopped by SIGTERM or Ctrl-C; finished work is kept."""


class Waits:
    """Tell the user that calls fail and are tried again: a line on standard error once in TELL_EVERY_S seconds, however
    many threads wait. `listener`, where set, is called with its words."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None
        self._lock = threading.Lock()
        self._last = float("-inf")

    def tell(self, text: str, waited_s: float) -> None:
        """Tell it, unless something was told just now; the wait has lasted `waited_s` seconds."""
        with self._lock:
            if time.monotonic() - self._last < TELL_EVERY_S:
                return
            self._last = time.monotonic()
        tell(f"{text}; {waited_s:.0f} s so far")
        if self.listener:
            self.listener(text)


waits = Waits()


class Retries:
    """Call a function again while it raises TransientError; after `deadline_s` seconds the last one is raised.

    Waits between tries are random and at most `longest_wait_s` seconds. Setting `stop` ends a wait at once with
    StoppedError. `other_side` names the store or server: calls that fail for a while are then told to the user.
    """

    def __init__(
        self,
        deadline_s: float = 120.0,
        longest_wait_s: float = 10.0,
        stop: threading.Event | None = None,
        other_side: str = "",
    ):
        self.deadline_s, self.longest_wait_s = deadline_s, longest_wait_s
        self.stop = stop or threading.Event()
        self.other_side = other_side

    def call(self, function: Callable[[], Result]) -> tuple[Result, int]:
        """Return the function's result and the number of tries it took. Raises TransientError, StoppedError."""
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return function(), tries
            except TransientError as error:
                waited = time.monotonic() - started
                if waited >= self.deadline_s:
                    error.attempts = tries
                    raise
                if self.other_side and waited >= TELL_AFTER_S:
                    waits.tell(f"waiting for {self.other_side}: {error}", waited)
            longest = FIRST_WAIT_S * 2 ** min(tries - 1, MOST_DOUBLINGS)
            self._sleep(random.uniform(0, min(longest, self.longest_wait_s)))

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise StoppedError


class Watchdog:
    """Tell an outage from single objects that fail: in an outage several different ones fail, and none succeeds between
    them. Safe to use from many threads."""

    def __init__(self, patience_s: float, several: int = 3):
        self.patience_s, self.several = patience_s, several
        self._failing: set[Hashable] = set()
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def success(self) -> None:
        """Note that an object has succeeded."""
        with self._lock:
            self._failing.clear()
            self._last = time.monotonic()

    def suspects(self, failing: Hashable) -> bool:
        """Note that an object has failed. Returns whether that looks like an outage: nothing has succeeded for
        `patience_s` seconds, and at least `several` different objects have failed since."""
        with self._lock:
            self._failing.add(failing)
            return len(self._failing) >= self.several and time.monotonic() - self._last > self.patience_s

    def raise_in_outage(
        self, failing: Hashable, error: TransientError, probe: Callable[[], object], probing: Retries
    ) -> None:
        """Raise OutageError where `failing` failed with `error` because nothing works: `suspects` says so, and with
        `probing` a call of `probe`, which does not depend on what fails, raises TransientError. Objects that can never
        be served would else end every run of a scan."""
        if not self.suspects(failing):
            return
        try:
            probing.call(probe)
        except TransientError:
            raise OutageError(
                f"nothing has worked for {self.patience_s:.0f} s, last: {error}; run the same command again"
            ) from None
        self.success()
