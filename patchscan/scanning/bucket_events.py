"""Read which objects of a bucket have changed: from events that its notifications put into a queue, or from lines.

A line, or a message, is a key as it is, or JSON: an event notification of S3 itself, of SNS or of EventBridge, or
`{"key": ...}`. What happened to an object is not read: whether and how it exists now is looked up.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote_plus

from patchscan.common.console import tell
from patchscan.scanning.plan import ScanSource
from patchscan.storage.queue import Message, Queue

STANDARD_INPUT = "-"


class EventError(ValueError):
    """A line or message that names no object; the message says why."""


class EventReader:
    """Collects the objects of one source that events name; tells on standard error what cannot be read.

    `keys` are those of the source, each once. `outside` counts names that do not begin with its prefix, `unreadable`
    the lines and messages that could not be read; `messages` are the received ones that may be deleted when their
    objects are scanned.
    """

    def __init__(self, source: ScanSource):
        self.keys: dict[str, None] = {}
        self.outside = self.unreadable = 0
        self.messages: list[Message] = []
        self._bucket, self._prefix = source.bucket, source.prefix

    def read_lines(self, lines: BinaryIO) -> None:
        """Read UTF-8 lines, each a key or an event; the first may begin with a byte order mark."""
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(BOM_UTF8) if number == 1 else line
            self._read(text.removesuffix(b"\n"), f"line {number}")

    def read_queue(self, queue: Queue, most: int) -> None:
        """Receive at most `most` messages. Those that cannot be read stay in the queue."""
        for message in queue.receive(most):
            if self._read(message.body, f"message {message.id}, which stays in the queue"):
                self.messages.append(message)

    def _read(self, text: str | bytes, where: str) -> bool:
        """Note what a line or message names. Returns whether it can be read."""
        try:
            body = text if isinstance(text, str) else text.decode()
            keys = [self._key(bucket, key) for bucket, key in named_objects(body)]
        except ValueError as error:  # an EventError, or bytes that are not UTF-8
            why = str(error) if isinstance(error, EventError) else "it is not UTF-8"
            tell(f"{where}: {why}")
            self.unreadable += 1
            return False
        # A queue may hold the events of the whole bucket: those of other prefixes are not ours to score.
        inside = [key for key in keys if key.startswith(self._prefix)]
        self.keys.update(dict.fromkeys(inside))
        self.outside += len(keys) - len(inside)
        return True

    def _key(self, bucket: str | None, key: str) -> str:
        if bucket not in (None, self._bucket):
            raise EventError(f"it is about bucket {bucket}, which is not scanned")
        return key


def named_objects(body: str) -> Iterator[tuple[str | None, str]]:
    """Yield (bucket, key) for each object that a line or a message names; the bucket is None where only a key is given.
    Raises EventError."""
    if not body.lstrip().startswith("{"):
        for line in body.split("\n"):
            if key := line.removesuffix("\r"):
                yield None, _checked(key)
        return
    try:
        for bucket, key in _names(json.loads(body)):
            yield bucket, _checked(key)
    except EventError:
        raise
    except (ValueError, RecursionError):
        raise EventError('it begins as JSON and is none; write {"key": ...} for a key that begins with {') from None


def _names(event: Any) -> Iterable[tuple[str | None, str]]:
    match event:
        case {"Event": "s3:TestEvent"}:  # what S3 sends when notifications are set up
            return []
        case {"Records": [*records]}:
            return [name for record in records for name in _names(record)]
        case {"s3": {"bucket": {"name": str(bucket)}, "object": {"key": str(key)}}}:
            return [(bucket, unquote_plus(key))]
        case {"detail": {"bucket": {"name": str(bucket)}, "object": {"key": str(key)}}}:
            return [(bucket, key)]  # EventBridge does not encode keys
        case {"Type": "Notification", "Message": str(message)}:  # SNS
            return _names(json.loads(message))
        case {"key": str(key)}:
            return [(None, key)]
    raise EventError("it is no event of a bucket, and names no key")


def _checked(key: str) -> str:
    """The key, where it can be one. Raises EventError."""
    try:
        key.encode()
    except UnicodeEncodeError:
        raise EventError("its key is not UTF-8") from None
    if not key:
        raise EventError("its key is empty")
    return key
