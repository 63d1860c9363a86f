"""Fetch objects with retries, and tell single ones that cannot be read from a store that is down and from rights that
have ended."""

import threading
from contextlib import suppress
from functools import partial

from patchscan.common.retries import Retries, TransientError, Watchdog
from patchscan.storage.store import FailureCode, FetchedObject, ObjectError, ObjectInfo, Store, StoreError

# After access was denied to so many objects in a row, one that could be read before is tried.
DENIED = 20


class Fetcher:
    """Fetches objects of a store, from any number of threads. Times are in seconds: `deadline_s` for all tries of one
    object; `outage_s` is how long nothing has succeeded when several objects that fail are an outage. `other_side`
    names the store to a user who waits for it (see Retries).

    `readable` is an object that could be read before, or None.
    """

    def __init__(
        self,
        store: Store,
        deadline_s: float = 180.0,
        outage_s: float = 180.0,
        stop: threading.Event | None = None,
        other_side: str = "",
    ):
        self.store = store
        self.readable: ObjectInfo | None = None
        self._retries = Retries(deadline_s, stop=stop, other_side=other_side)
        self._probing = Retries(deadline_s / 3, stop=stop)
        self._outage_watch, self._rights_watch = Watchdog(outage_s), Watchdog(0.0, several=DENIED)

    def fetch(self, info: ObjectInfo, limit: int) -> tuple[FetchedObject, int]:
        """Return the object, as `Store.fetch` does, and the number of tries that it took.

        Raises ObjectError and TransientError where this object cannot be read, OutageError and StoreError where nothing
        can, and StoppedError.
        """
        try:
            fetched, tries = self._retries.call(lambda: self.store.fetch(info, limit))
        except ObjectError as error:
            self._raise_if_rights_ended(info, error)
            raise
        except TransientError as error:
            failing = (info.key, info.version_id)
            self._outage_watch.raise_in_outage(failing, error, partial(self._answers, info), self._probing)
            raise
        self._outage_watch.success()
        self._rights_watch.success()
        self.readable = info
        return fetched, tries

    def _raise_if_rights_ended(self, info: ObjectInfo, error: ObjectError) -> None:
        """Raise StoreError where access is denied to an object that could be read before, too: some stores say no more
        than that when temporary credentials end."""
        if error.code != FailureCode.ACCESS_DENIED or not self._rights_watch.suspects((info.key, info.version_id)):
            return
        try:
            self._read_byte(info)
        except ObjectError as denied:
            if denied.code == FailureCode.ACCESS_DENIED and self.readable:
                raise StoreError(
                    f"{self.store.url}: access is denied also to what could be read before; "
                    "renew the credentials and run the same command again"
                ) from None
        except TransientError:
            pass
        self._rights_watch.success()

    def _answers(self, otherwise: ObjectInfo) -> None:
        """Raise TransientError where the store gives no answer about an object; a refusal is one."""
        with suppress(ObjectError):
            self._read_byte(otherwise)

    def _read_byte(self, otherwise: ObjectInfo) -> None:
        """Read a byte of an object that could be read before, or of `otherwise`."""
        self.store.fetch(self.readable or otherwise, 0)
