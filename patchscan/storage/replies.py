"""Read what S3 stores say of objects, listings and regions, each in its own way."""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.utils import parse_timestamp

from patchscan.storage.store import MAX_SIZE, ObjectInfo, bare_etag

# What boto3 leaves out of a listing: the name of its XML's first element, IsTruncated unless it is spelt `true`, and
# how a listing of version 1 goes on.
PROLOG = rb"(?>\s+|\xef\xbb\xbf|<\?.*?\?>|<!--.*?-->|<![a-z][^>]*>)*+"
ROOT = re.compile(PROLOG + rb"<(?:[\w.-]+:)?(\w+)", re.IGNORECASE | re.DOTALL)
# Some stores write ListBucketResultV2 or ListBucketV2Result.
LISTING_ROOT = re.compile(rb"ListBucket\w*Result\w*")
TRUNCATED = re.compile(rb"<(?:[\w.-]+:)?IsTruncated>\s*([^\s<]+)", re.IGNORECASE)
NEXT_MARKER = re.compile(rb"<(?:[\w.-]+:)?NextMarker>\s*[^\s<]", re.IGNORECASE)
# Where a reply names the region of its bucket, when the header x-amz-bucket-region and the field Region do not.
REGION_TEXT = re.compile(
    r"expecting '([a-z0-9-]+)'|The ([a-z0-9-]+) location constraint|\bs3[.-]([a-z]+(?:-[a-z]+)+-[0-9]+)\."
)


def told_region(reply: Any) -> str | None:
    """The region that a reply to a request of another region names, or None."""
    header = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    error = reply.get("Error", {})
    text = REGION_TEXT.search(f"{error.get('Endpoint', '')} {error.get('Message', '')}")
    region = str(header or error.get("Region") or (text and next(filter(None, text.groups()))) or "")
    return region if re.fullmatch("[a-z0-9-]+", region) else None


def note_what_boto_leaves_out(http_response: Any, parsed: dict[str, Any], **_: Any) -> None:
    """Complete a parsed listing by its XML: IsTruncated is true where that says so in any way, and of an XML that is no
    listing, such as one of versions, nothing is left."""
    if http_response.status_code != 200:
        return
    root = ROOT.match(http_response.content)
    if root is None or not LISTING_ROOT.fullmatch(root[1]):
        parsed.clear()
    elif _goes_on(http_response.content):
        parsed["IsTruncated"] = True


def _goes_on(xml: bytes) -> bool:
    """Whether a listing says that it is not the end. A NextMarker does where there is no IsTruncated; beside one that
    says no, some stores write the last key there."""
    truncated = TRUNCATED.search(xml)
    return not truncated[1].lower().startswith((b"false", b"0")) if truncated else bool(NEXT_MARKER.search(xml))


def parse_time(value: Any) -> datetime | None:
    """Parse a reply's time as one in UTC; None where it is none. boto3's own parser guesses the format each time, which
    is most of the cost of a listing."""
    time = None
    with suppress(ValueError, TypeError):
        time = parsedate_to_datetime(value) if value[3:4] == "," else datetime.fromisoformat(value)
    if time is None:
        with suppress(ValueError, TypeError, OverflowError, RuntimeError):
            time = parse_timestamp(value)
    with suppress(OverflowError):  # at either end of the calendar
        return time and (time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC))
    return None


def told_size(headers: Mapping[str, str], info: ObjectInfo) -> int | None:
    """The size of an object as the reply says it, or None. A reply that says nothing of its length ends where the
    connection does: then the listing tells whether that is all."""
    length = headers.get("content-length", "")
    if length.isdecimal():
        return int(length)
    return None if "transfer-encoding" in headers or "content-encoding" in headers else info.size


def listed_info(listed: Any) -> ObjectInfo:
    """The object of an entry of a listing, in which S3 calls all but the key optional."""
    size, restore = listed.get("Size"), listed.get("RestoreStatus")
    return ObjectInfo(
        key=listed["Key"],
        size=size if size is not None and 0 <= size <= MAX_SIZE else None,
        etag=bare_etag(listed.get("ETag")),
        last_modified=listed.get("LastModified"),
        storage_class=listed.get("StorageClass"),
        restored=restore and "RestoreExpiryDate" in restore,
    )
