"""Let a scan run as many worker pods at once as the servers can answer, between two bounds.

The number grows by the least one every ADJUST_S seconds while the server answers, and falls back to the least one where
it is overloaded (503), as the window of a TCP connection does. Pods that are ended for it save what they have done, and
do not count as failures.
"""

import time
from collections.abc import Callable

from patchscan.cluster.client import Cluster, Job

ADJUST_S = 60.0


def next_parallelism(current: int, least: int, most: int, has_room: bool) -> int:
    """How many pods to run at once after `current`: more by `least` where the server has room, else `least`."""
    return max(least, min(current + least, most)) if has_room else least


class Elastic:
    """Adjusts a Job's parallelism while the Job is followed. `has_room` asks the server, within seconds."""

    def __init__(self, cluster: Cluster, least: int, most: int, has_room: Callable[[], bool]):
        self._cluster, self._least, self._most, self._has_room = cluster, least, most, has_room
        self._last = time.monotonic()
        # A state of the Job may have been read before the last change.
        self._now: int | None = None

    def adjust(self, job: Job) -> str:
        """Change the Job's parallelism where that is due. Returns a sentence that says so, empty where nothing changed.

        Raises JobGoneError, ClusterError, OutageError.
        """
        left = job.completions - job.succeeded - len(job.failed_indexes)
        if job.finished or time.monotonic() - self._last < ADJUST_S:
            return ""
        self._last = time.monotonic()
        room = self._has_room()
        now = job.parallelism if self._now is None else self._now
        self._now = next_parallelism(now, self._least, min(self._most, max(left, self._least)), room)
        if self._now == now:
            return ""
        self._cluster.patch_job(job.name, {"spec": {"parallelism": self._now}})
        why = "the server has room" if room else "the server is overloaded"
        return f"Job {job.name}: up to {self._now} pods at once, before {now}: {why}"
