"""Run processes over a simulated S3 in one order out of all possible ones, chosen by a seed, and the same one again.

Each process has a thread, and only one of them runs: it hands over to another at its calls to the store, where it may
also be killed, get an error, or lose a reply. Time is simulated: it passes with calls and while all processes sleep.
"""

import io
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

from botocore.exceptions import ClientError

from patchscan.common.retries import Retries, TransientError
from patchscan.storage.bucket import Bucket
from patchscan.storage.store import ObjectInfo

LONG_AGO = format_datetime(datetime(2026, 1, 1, tzinfo=UTC), usegmt=True)
MOST_CALLS = 4_000


Reply = TypeVar("Reply")


class Killed(BaseException):
    """The process dies here, as by kill -9: nothing that it does afterwards has an effect."""


class Choices:
    """Draws from a seed, and remembers what was drawn. With `recorded` draws, those come again, and then zeros: a zero
    always means that nothing special happens, so that a schedule with more zeros is a simpler one."""

    def __init__(self, seed: int, recorded: Sequence[int] | None = None):
        self.seed, self.drawn = seed, list[int]()
        self._random = random.Random(seed)
        self._recorded = recorded

    def chance(self, probability: float) -> bool:
        """Whether something happens that has this probability."""
        if self._recorded is not None:
            return bool(self._next(2))
        self.drawn.append(self._random.random() < probability)
        return bool(self.drawn[-1])

    def pick(self, count: int) -> int:
        """A number below `count`."""
        if self._recorded is not None:
            return self._next(count)
        self.drawn.append(int(self._random.random() * count))
        return self.drawn[-1]

    def _next(self, count: int) -> int:
        assert self._recorded is not None
        at = len(self.drawn)
        self.drawn.append(min(self._recorded[at], count - 1) if at < len(self._recorded) else 0)
        return self.drawn[-1]


@dataclass(kw_only=True)
class Weather:
    """How likely it is that a call is the process's last, that it fails (with or without its effect), that another
    process goes on first, and how many seconds a call takes."""

    kill: float = 0.0
    error: float = 0.0
    switch: float = 0.3
    call_s: float = 0.05


@dataclass(eq=False)
class Process:
    """A command that runs. `outcome`: what it returned, or the exception that ended it."""

    name: str
    command: Callable[["Process"], Any]
    stop: threading.Event = field(default_factory=threading.Event)
    outcome: Any = None
    ended: bool = False
    killed: bool = False
    wakes_at: float = 0.0
    thread: "ProcessThread | None" = None


class ProcessThread:
    """A thread that runs one process after the other, each when `turn` is released for the first time. Threads are kept
    from one schedule to the next: to start one takes longer than most processes."""

    idle: ClassVar[list["ProcessThread"]] = []

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.turn.acquire()
        self.run: Callable[[], None] = lambda: None
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.turn.acquire()
            run, self.run = self.run, lambda: None
            run()
            del run  # it holds a schedule


class Simulation:
    """The processes of one schedule, the time, and the trace of what has happened. `between` is called before each
    call: the rest of the world changes there."""

    def __init__(self, choices: Choices, weather: Weather):
        self.choices, self.weather = choices, weather
        self.now = 0.0
        self.calls = 0
        self.told: list[tuple[float, str, str, str]] = []
        self.processes: list[Process] = []
        self.current: Process | None = None
        self.between: Callable[[Process], None] | None = None
        self.over = False
        self._main = threading.Lock()
        self._main.acquire()

    def start(self, name: str, command: Callable[[Process], Any]) -> Process:
        """Start a process; it runs when it gets its turn."""
        process = Process(name, command)
        process.thread = thread = ProcessThread.idle.pop() if ProcessThread.idle else ProcessThread()
        thread.run = partial(self._run, process, thread)
        self.processes.append(process)
        return process

    def run(self) -> None:
        """Run until all processes have ended."""
        following = self._next()
        if following is not None:
            self._give_turn(following)
            self._main.acquire()
        self.processes.clear()

    def call(self, operation: str, name: str, effect: Callable[[], Reply]) -> Reply:
        """Make a call of the current process to a store. Its effect happens at once; before it, others may run."""
        process = self.step()
        choices, weather = self.choices, self.weather
        if weather.kill and choices.chance(weather.kill):
            process.killed = True
            done = choices.chance(0.5)
            self.tell(f"{operation} {name}: killed {'after' if done else 'before'} it", process)
            if done:
                effect()
            raise Killed
        if weather.error and choices.chance(weather.error):
            done = choices.chance(0.5)
            self.tell(f"{operation} {name}: {'done, the reply is lost' if done else 'error 500, not done'}", process)
            if done:
                effect()
            raise failure(500, "InternalError", operation)
        self.told.append((self.now, process.name, operation, name))
        return effect()

    def sleep(self, seconds: float) -> None:
        """Let the current process sleep."""
        process = self.current
        assert process is not None
        process.wakes_at = self.now + seconds
        self._hand_over(process)

    def tell(self, what: str, process: Process | None = None, with_what: str = "") -> None:
        """Note what happens."""
        self.told.append((self.now, process.name if process else "", what, with_what))

    def trace(self) -> str:
        """What has happened, line by line."""
        return "\n".join(
            f"{now:8.2f}  {name:9}  {what} {with_what}".rstrip() for now, name, what, with_what in self.told
        )

    def step(self) -> Process:
        """Let the world change and others run, before the current process goes on."""
        process = self.current
        assert process is not None
        self.calls += 1
        self.now += self.weather.call_s
        if process.killed or self.over:
            raise Killed
        if self.calls > MOST_CALLS:
            raise RuntimeError("the processes do not come to an end")
        if self.between:
            self.between(process)
        if len(self.processes) > 1 and self.choices.chance(self.weather.switch):
            self._hand_over(process)
        return process

    def _run(self, process: Process, thread: ProcessThread) -> None:
        try:
            process.outcome = process.command(process)
        except BaseException as error:  # noqa: BLE001  whoever runs the schedule looks at it
            process.outcome = error
        process.ended = True
        ProcessThread.idle.append(thread)
        self._give_turn(self._next())

    def _give_turn(self, following: Process | None) -> None:
        """Let another process go on; where there is none, what has started them."""
        self.current = following
        (following.thread.turn if following and following.thread else self._main).release()

    def _hand_over(self, process: Process) -> None:
        following = self._next()
        if following is not process:
            assert process.thread is not None
            self._give_turn(following)
            process.thread.turn.acquire()
        if self.over:
            raise Killed

    def _next(self) -> Process | None:
        """The process that goes on: with the draw 0, the current one."""
        alive = [process for process in self.processes if not process.ended]
        if not alive:
            return None
        awake = [process for process in alive if process.wakes_at <= self.now]
        if not awake:
            self.now = min(process.wakes_at for process in alive)
            awake = [process for process in alive if process.wakes_at <= self.now]
        if len(awake) == 1:
            return awake[0]
        if self.current in awake:
            awake.remove(self.current)
            awake.insert(0, self.current)
        return awake[self.choices.pick(len(awake))]


def failure(status: int, code: str, operation: str) -> ClientError:
    """What boto3 raises for a reply."""
    reply: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(reply, operation)


@dataclass(frozen=True)
class Stored:
    """An object of the simulated S3."""

    data: bytes
    etag: str
    storage_class: str = "STANDARD"
    created_at: float = -1e9


class SimulatedS3:
    """One bucket, with boto3's methods. `honours`: it heeds If-None-Match. `listed_etags`: its listings have ETags.
    `stale_s`: for so many seconds a new key may be missing in listings. `page`: keys in a page."""

    def __init__(
        self,
        simulation: Simulation,
        *,
        page: int = 1_000,
        honours: bool = True,
        listed_etags: bool = True,
        stale_s: float = 0.0,
    ):
        self.simulation = simulation
        self.page, self.honours, self.listed_etags, self.stale_s = page, honours, listed_etags, stale_s
        self.objects: dict[str, Stored] = {}
        self.refusal: Callable[[str], ClientError | None] = lambda key: None
        self.written: Callable[[str, bytes | None, bytes], None] = lambda key, before, now: None
        self.deleted: Callable[[str], None] = lambda key: None

    def put_object(self, **request: Any) -> dict[str, Any]:
        """Write an object; 412 where it exists and IfNoneMatch is given and heeded."""
        key, data, new = request["Key"], request["Body"], "IfNoneMatch" in request

        def put() -> dict[str, Any]:
            before = self.objects.get(key)
            if new and self.honours and before:
                raise failure(412, "PreconditionFailed", "PutObject")
            created = before.created_at if before else self.simulation.now
            self.objects[key] = Stored(data, "", created_at=created)
            self.written(key, before.data if before else None, data)
            return {}

        return self.simulation.call("PutObject", f"{key} if new" if new else key, put)

    def get_object(self, **request: Any) -> dict[str, Any]:
        """Read an object: 404, 412 where IfMatch names another ETag, 403 in cold storage."""
        key, etag = request["Key"], request.get("IfMatch", "").strip('"')

        def get() -> dict[str, Any]:
            stored, refused = self.objects.get(key), self.refusal(key)
            if refused:
                raise refused
            if stored is None:
                raise failure(404, "NoSuchKey", "GetObject")
            if etag and etag != stored.etag:
                raise failure(412, "PreconditionFailed", "GetObject")
            if stored.storage_class == "GLACIER":
                raise failure(403, "InvalidObjectState", "GetObject")
            return {"Body": io.BytesIO(stored.data), "ETag": f'"{stored.etag}"', "ContentLength": len(stored.data)}

        return self.simulation.call("GetObject", key, get)

    def delete_object(self, **request: Any) -> dict[str, Any]:
        """Remove an object, if it exists."""
        key = request["Key"]

        def delete() -> dict[str, Any]:
            if self.objects.pop(key, None):
                self.deleted(key)
            return {}

        return self.simulation.call("DeleteObject", key, delete)

    def list_objects_v2(self, **request: Any) -> dict[str, Any]:
        """A page of a listing; the token is the last key of the page before."""
        prefix, after = request["Prefix"], request.get("ContinuationToken", "")

        def page() -> dict[str, Any]:
            keys = sorted([key for key in self.objects if key.startswith(prefix) and key > after])
            shown = keys[: self.page]
            listed = [self._entry(key) for key in shown if not self._hidden(key)]
            more = {"NextContinuationToken": shown[-1]} if len(keys) > len(shown) else {}
            return {"KeyCount": len(listed), "Contents": listed, "IsTruncated": bool(more), **more}

        return self.simulation.call("ListObjectsV2", f"{prefix}* after {after}" if after else f"{prefix}*", page)

    def _hidden(self, key: str) -> bool:
        recent = self.simulation.now - self.objects[key].created_at < self.stale_s
        return recent and self.simulation.choices.chance(0.5)

    def _entry(self, key: str) -> dict[str, Any]:
        stored = self.objects[key]
        etag = {"ETag": f'"{stored.etag}"'} if self.listed_etags else {}
        return {"Key": key, "Size": len(stored.data), "StorageClass": stored.storage_class, **etag}


class FewTries(Retries):
    """Tries a call up to five times, without the cost of the real back-off; its waits are simulated."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation

    def call(self, function: Callable[[], Any]) -> tuple[Any, int]:
        for tries in range(1, 5):
            try:
                return function(), tries
            except TransientError:
                self.simulation.sleep(1.0)
        return function(), 5


class SimulatedBucket(Bucket):
    """The product's own Bucket over a simulated S3, listed by one thread."""

    def __init__(self, url: str, service: SimulatedS3):
        self.url, self.bucket, self.prefix = url, url.removeprefix("s3://"), ""
        self.requests, self.bytes_read = Counter(), 0
        self._lock = threading.Lock()
        self._client: Any = service
        self._retries = FewTries(service.simulation)
        self._payer, self._optional = {}, []
        self._reader: Any = SimpleNamespace(get=self._get)
        self.listed: list[ObjectInfo] = []
        self.listed_from = 0

    def _get(self, info: ObjectInfo) -> tuple[dict[str, str], io.BytesIO]:
        """ObjectReader.get: headers and body of an object, if it is the one that was listed."""
        reply = self._client.get_object(Key=info.key, IfMatch=info.etag or "")
        length = str(reply["ContentLength"])
        return {"etag": reply["ETag"], "content-length": length, "last-modified": LONG_AGO}, reply["Body"]

    def objects(self) -> Iterator[ObjectInfo]:
        self.listed_from = self._client.simulation.calls
        token: str | None = None
        while True:
            page = self._page(token=token)
            self.listed += page.objects
            yield from page.objects
            token = page.token
            if token is None:
                return
