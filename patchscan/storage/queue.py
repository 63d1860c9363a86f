"""Receive and delete the messages of an SQS queue. Credentials come from boto3's own chain and from nowhere else."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors

from patchscan.common.retries import Retries, TransientError
from patchscan.storage.boto import (
    BUSY_CODES,
    BUSY_STATUS,
    call_boto,
    connection_error,
    make_client,
    status_and_code,
)
from patchscan.storage.store import StoreError

# What SQS takes and gives in one call.
CALL = 10
# A received message is hidden from other receivers for so long, and given again where it was not deleted by then.
HIDDEN_S = 3600
# How long SQS looks for a message. Without a wait it asks only some of its servers, and may find none.
LOOK_S = 2
REGION = re.compile(r"(?:^|\.)sqs\.([a-z0-9-]+)\.amazonaws\.com")


@dataclass(frozen=True)
class Message:
    """A message that was received; `receipt` is what deletes it."""

    id: str
    body: str
    receipt: str


class Queue:
    """The SQS queue at a URL, at whose host its calls go to. Raises StoreError where it cannot be used."""

    def __init__(self, url: str):
        self.url = url
        self._retries = Retries(other_side=url)
        parts = urlsplit(url)
        region = REGION.search(parts.hostname or "")
        self._client = make_client(url, "sqs", f"{parts.scheme}://{parts.netloc}", region[1] if region else None)

    def receive(self, most: int) -> Iterator[Message]:
        """Yield messages until none is left, at most `most` of them. Raises StoreError, OutageError."""
        while most > 0:
            limits = {
                "MaxNumberOfMessages": min(CALL, most),
                "VisibilityTimeout": HIDDEN_S,
                "WaitTimeSeconds": LOOK_S,
            }
            reply = self._call(partial(self._client.receive_message, QueueUrl=self.url, **limits))
            found = reply.get("Messages", [])
            if not found:
                return
            most -= len(found)
            for one in found:
                yield Message(one["MessageId"], one["Body"], one["ReceiptHandle"])

    def delete(self, messages: Sequence[Message]) -> int:
        """Delete messages. Returns how many could not be deleted: they come again. Raises StoreError, OutageError."""
        failed = 0
        for first in range(0, len(messages), CALL):
            entries = [
                {"Id": str(index), "ReceiptHandle": message.receipt}
                for index, message in enumerate(messages[first : first + CALL])
            ]
            reply = self._call(partial(self._client.delete_message_batch, QueueUrl=self.url, Entries=entries))
            failed += len(reply.get("Failed", []))
        return failed

    def _call(self, function: Callable[[], Any]) -> Any:
        return call_boto(self._retries, f"{self.url}: the queue", function, self._translate)

    def _translate(self, error: Exception) -> Exception:
        """Turn boto3's error into ours, without its text, which can contain keys and host names."""
        if translated := connection_error(self.url, error):
            return translated
        if not isinstance(error, boto_errors.ClientError):
            why = type(error).__name__
            return StoreError(f"{self.url}: {why}; check credentials and region (docs/scan.md), and run again")
        status, code = status_and_code(error)
        if status >= 500 or status in BUSY_STATUS or code in BUSY_CODES:
            return TransientError(f"{status} {code}")
        return StoreError(
            f"{self.url}: the queue refuses {error.operation_name} ({code}); check its name, region and your rights"
        )
