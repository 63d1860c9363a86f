"""Trying again: one policy for stores and servers, with jittered back-off, a deadline and a stop signal."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from patchscan.common.errors import EXIT_INTERRUPTED, UserError

Result = TypeVar("Result")


class TransientError(Exception):
    """The other side is busy, restarting or out of reach: the same call may work in a moment. `attempts` counts the
    tries after which it was given up."""

    attempts = 1


class OutageError(UserError):
    """Nothing has worked for so long that going on makes no sense; what is done is kept, and a rerun goes on."""

    exit_code = EXIT_INTERRUPTED


class StoppedError(Exception):
    """The work was told to stop (SIGTERM, Ctrl-C); what is done is kept."""


class Retries:
    """Calls a function until it works, raising Transient's last occurrence after `deadline_s` seconds.

    `stop` ends the waiting at once with StoppedError.
    """

    def __init__(self, deadline_s: float = 120.0, longest_wait_s: float = 10.0, stop: threading.Event | None = None):
        self.stop = stop or threading.Event()
        self._policy = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=longest_wait_s),
            stop=tenacity.stop_after_delay(deadline_s),
            sleep=self._sleep,
            reraise=True,
        )

    def call(self, function: Callable[[], Result]) -> tuple[Result, int]:
        """The function's result, and the number of tries it took."""
        policy = self._policy.copy()
        try:
            result = policy(function)
        except TransientError as error:
            error.attempts = policy.statistics["attempt_number"]
            raise
        return result, policy.statistics["attempt_number"]

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise StoppedError


class Watchdog:
    """Tells an outage from an object that fails: `check` raises OutageError when nothing succeeded for `patience_s`."""

    def __init__(self, patience_s: float = 300.0):
        self.patience_s = patience_s
        self._last = time.monotonic()

    def success(self) -> None:
        """Something worked."""
        self._last = time.monotonic()

    def check(self, why: object) -> None:
        """Something failed for the reason `why`."""
        if time.monotonic() - self._last > self.patience_s:
            raise OutageError(
                f"nothing has worked for {self.patience_s:.0f} s, last: {why}; run the same command again"
            )
