"""Read and write objects of an S3 bucket. Credentials come from boto3's own chain and from nowhere else."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import botocore.loaders
import botocore.session
from botocore import exceptions as boto_errors
from botocore.parsers import ResponseParserError

from patchscan.common.files import DISK_FULL
from patchscan.common.retries import OutageError, Retries, TransientError
from patchscan.storage.boto import (
    BUSY_CODES,
    BUSY_STATUS,
    CALL_ERRORS,
    NO_ADDRESS,
    call_boto,
    connection_error,
    make_client,
    status_and_code,
)
from patchscan.storage.key_ranges import PAGE, KeyRanges, Page, Repetition
from patchscan.storage.object_reader import ObjectReader
from patchscan.storage.replies import (
    listed_info,
    note_what_boto_leaves_out,
    parse_time,
    told_region,
    told_size,
)
from patchscan.storage.store import (
    TEMPORARY_FULL,
    AccessDeniedError,
    FailureCode,
    FetchedObject,
    ObjectError,
    ObjectInfo,
    StoreError,
    UnorderedError,
    UnusableNameError,
    bare_etag,
    encodings,
    split_url,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

Result = TypeVar("Result")

LISTING_THREADS = 16
NOT_IMPLEMENTED = 501
# Bytes of a download that are held at once.
PIECE = 2**20
# What every reply to ListObjectsV2 has some of; boto3 turns any other XML, such as a web page, into an empty reply.
LISTING_FIELDS = {"IsTruncated", "KeyCount", "MaxKeys", "Name", "Prefix", "Contents", "CommonPrefixes"}
# Access points, whose listings may name the bucket behind them: ARNs, and the names that AWS makes for them.
ACCESS_POINT = re.compile(r":|-s3alias$|--(xa|ol|op)-s3$")
# Shared by all clients, so that boto3's description of S3 is read only once.
LOADER = botocore.loaders.create_loader()
# What an object that cannot be read is for a command that needs this one; else a StoreError.
ERROR_CLASSES: dict[FailureCode, type[StoreError]] = {
    FailureCode.ACCESS_DENIED: AccessDeniedError,
    FailureCode.ARCHIVED: UnusableNameError,
}
# AWS's own hosts, in all its partitions that take requests from outside.
AWS_HOST = re.compile(r"\.(amazonaws\.(com|com\.cn|eu)|api\.aws)$")
# How the names of S3's directory buckets end; they refuse to list optional attributes.
DIRECTORY_BUCKET = "--x-s3"
# Codes about credentials that are wrong or have ended, as S3, STS and other stores spell them: ExpiredToken,
# ExpiredTokenException, RequestExpired, TokenRefreshRequired, InvalidToken, InvalidAccessKeyId, SignatureDoesNotMatch,
# InvalidClientTokenId, UnrecognizedClientException, MissingAuthenticationToken, RequestTimeTooSkewed, ...
CREDENTIAL_CODE = re.compile(
    r"expired|credential|access_?key|signature|security|^(invalid|access)?_?token|client_?token|unrecognized_?client"
    r"|authentication|auth_?failure|identity_?token|too_?skewed|^unauthorized",
    re.IGNORECASE,
)
# The calls that this file makes, and the one with which boto3 asks for a bucket's region. Errors of any other are those
# of renewing the credentials (AssumeRole, GetRoleCredentials, ...).
OPERATIONS = {"ListObjectsV2", "GetObject", "HeadObject", "PutObject", "DeleteObject", "HeadBucket"}
REGION_CODES = {
    "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
    "Redirect",
}


class Bucket:
    """A bucket, or a prefix of one, as a `Store`, which says what the methods do. Keys are full keys; names of results
    are relative to the URL's prefix."""

    def __init__(self, url: str, *, endpoint_url: str | None, requester_pays: bool, threads: int):
        self.url = url
        self.bucket, self.prefix = split_url(url)
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._retries = Retries(other_side=url)
        self._payer: Any = {"RequestPayer": "requester"} if requester_pays else {}
        core = botocore.session.get_session()
        core.register_component("data_loader", LOADER)
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
        self._client: S3Client = make_client(
            url,
            "s3",
            endpoint_url,
            core=core,
            max_pool_connections=max(threads, LISTING_THREADS),
            # boto3 takes most of the CPU time of a small object, an eighth of that to validate our arguments and to
            # compose its user agent.
            parameter_validation=False,
        )
        if not AWS_HOST.search(urlsplit(self._client.meta.endpoint_url).hostname or ""):
            # Other stores may refuse the checksums that boto3 adds to what it sends, or store them as a part of it.
            settings: Any = self._client.meta.config
            settings.request_checksum_calculation = settings.response_checksum_validation = "when_required"
        self._client.meta.events.register("before-send.s3", self._count)
        self._client.meta.events.register("after-call.s3.ListObjectsV2", note_what_boto_leaves_out)
        self._reader = ObjectReader(
            self._client, core, {"Bucket": self.bucket, **self._payer}, partial(self._count, "GetObject")
        )
        self._optional = [] if self.bucket.endswith(DIRECTORY_BUCKET) else ["RestoreStatus"]
        self._listing_threads = LISTING_THREADS
        self._listed_once = False

    def _count(self, event_name: str, **_: Any) -> None:
        with self._lock:
            self.requests[event_name.rpartition(".")[2]] += 1

    def objects(self) -> Iterator[ObjectInfo]:
        """Objects under the URL's prefix, in any order, the current version of each; LISTING_THREADS threads list, but
        one after an UnorderedError."""
        try:
            yield from KeyRanges(self._page, self._listing_threads)
        except UnorderedError:
            self._listing_threads = 1
            raise

    def _page(self, *, after: str = "", token: str | None = None, limit: int = PAGE) -> Page:
        entries, following = self._list(self.prefix, after, token, limit, self._optional)
        return Page([listed_info(entry) for entry in entries], following)

    def _list(
        self, prefix: str, after: str, token: str | None, limit: int, optional: Sequence[str] = ()
    ) -> tuple[list[Any], str | None]:
        """The entries of a page of a listing, and the token that continues it."""
        request: Any = {"Bucket": self.bucket, "Prefix": prefix, "MaxKeys": limit, **self._payer}
        request |= {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
        request |= {"OptionalObjectAttributes": optional} if optional else {}
        try:
            reply = self._ask_page(request)
            entries = reply.get("Contents", [])
            keys = [str(entry["Key"]) for entry in entries]
        except (ResponseParserError, ValueError, KeyError) as error:
            raise self._no_listing("its reply is no listing") from error
        if why := self._contradiction(reply, keys, prefix):
            raise self._no_listing(why)
        return entries, reply.get("NextContinuationToken") or None

    def _contradiction(self, reply: Any, keys: list[str], prefix: str) -> str | None:
        """Why a page of a listing may lack keys or hold some of elsewhere, or None."""
        if not LISTING_FIELDS & reply.keys():
            return "its reply is no listing"
        if reply.get("IsTruncated") and not reply.get("NextContinuationToken"):
            return "a listing is said to go on, and has no token with which to go on"
        if any(group.get("Prefix") for group in reply.get("CommonPrefixes", [])):
            return "a listing groups keys by a delimiter, which was not asked for"
        if reply.get("KeyCount", 0) > len(keys):
            return f"a page is said to have {reply['KeyCount']:,} keys, and has {len(keys):,}"
        if not prefix and self._is_other_bucket(reply.get("Name", "")):
            return "a listing is of another bucket"
        if not all(key.startswith(prefix) for key in keys):
            return f"a listing has keys that do not begin with {prefix}"
        return None

    def _is_other_bucket(self, told: str) -> bool:
        """Whether a listing names another bucket. Proxies and stores may name it in another case, with its tenant or
        with a suffix (`t1:photos`, `photos-123`)."""
        told, asked = told.lower(), self.bucket.lower()
        return told not in asked and asked not in told and not ACCESS_POINT.search(self.bucket)

    def _ask_page(self, request: dict[str, Any]) -> Any:
        """Ask for a page. Some stores refuse what they do not know: then without the optional attributes."""
        try:
            return self._call(partial(self._client.list_objects_v2, **request))
        except StoreError:
            if not request.pop("OptionalObjectAttributes", None):
                raise
            reply = self._call(partial(self._client.list_objects_v2, **request))
            self._optional = []
            return reply

    def _no_listing(self, why: str) -> StoreError:
        return StoreError(f"{self.url} cannot be listed: {why}; is this the address of an S3 store (ListObjectsV2)?")

    def look_up(self, key: str) -> ObjectInfo | None:
        """The object as it is now: HEAD, in the words of a listing."""

        def head() -> ObjectInfo:
            reply = self._client.head_object(Bucket=self.bucket, Key=key, **self._payer)
            restore = reply.get("Restore")
            return ObjectInfo(
                key=key,
                size=reply.get("ContentLength"),
                etag=bare_etag(reply.get("ETag")),
                last_modified=reply.get("LastModified"),
                # Only HEAD leaves out this one.
                storage_class=reply.get("StorageClass", "STANDARD"),
                restored="expiry-date" in restore if restore else None,
            )

        expected: dict[FailureCode, ObjectInfo | None] = dict.fromkeys(FailureCode, ObjectInfo(key=key))
        found = self._call(head, expected | {FailureCode.VANISHED: None})
        if found is None and not self._listed_once:
            self._page(limit=1)  # a HEAD says 404 of a bucket that does not exist, too
            self._listed_once = True
        return found

    def fetch(self, info: ObjectInfo, limit: int) -> FetchedObject:
        """Fetch the object in one try, and compare it with the listing by ETag."""
        try:
            headers, body = self._reader.get(info)
            with body as stream:
                data = stream.read(limit + 1)
        except CALL_ERRORS as error:
            raise self._translate(error) from None
        with self._lock:
            self.bytes_read += len(data)
        etag = bare_etag(headers.get("etag")) or info.etag
        if info.etag and etag != info.etag:
            raise ObjectError(FailureCode.CHANGED, "the object was replaced after it was listed")
        size = told_size(headers, info)
        size = len(data) if size is None else size
        if len(data) < min(size, limit + 1):
            raise TransientError("the download ended early")
        if not self._is_as_listed(info, headers, size):
            message = f"the store gives {size:,} bytes of what it lists with {info.size:,}"
            raise ObjectError(FailureCode.STORE_ERROR, message)
        version, encoding = headers.get("x-amz-version-id"), headers.get("content-encoding")
        return FetchedObject(data, size, etag, version, parse_time(headers.get("last-modified")), encoding)

    def _is_as_listed(self, info: ObjectInfo, headers: Mapping[str, str], size: int) -> bool:
        """Whether a reply has the size that the listing tells: else it is a part of the object, or something else, such
        as a page of a proxy. Not so what was packed on its way, or what a function behind an access point has made."""
        if not info.etag or "content-length" not in headers or headers.get("content-encoding"):
            return True
        return info.size in (None, size) or ACCESS_POINT.search(self.bucket) is not None

    def names(self, prefix: str) -> Iterator[str]:
        root = self._key("")
        token: str | None = None
        repetition = Repetition()
        while True:
            entries, token = self._list(self._key(prefix), "", token, PAGE)
            keys = [entry["Key"] for entry in entries]
            repetition.check(token, keys)
            yield from (key.removeprefix(root) for key in keys)
            if token is None:
                return

    def read(self, name: str) -> bytes | None:
        def read_body() -> bytes:
            return self._client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()

        return self._call(read_body, {FailureCode.VANISHED: None})

    def download(self, name: str, file: IO[bytes]) -> dict[str, str] | None:
        def copy_body() -> dict[str, str]:
            file.seek(0)
            file.truncate()  # an earlier try may have written a part
            reply = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
            with closing(reply["Body"]) as body:
                # Not writelines: a spooled file would hold all of it in memory.
                for piece in body.iter_chunks(PIECE):
                    file.write(piece)
            told = {
                "ContentEncoding": ", ".join(encodings(reply.get("ContentEncoding"))),
                "ContentType": reply.get("ContentType"),
            }
            return {header: value for header, value in told.items() if value}

        return self._call(copy_body, {FailureCode.VANISHED: None})

    def upload(self, name: str, file: IO[bytes], headers: Mapping[str, str]) -> None:
        kept: Any = headers

        def put() -> None:
            file.seek(0)
            self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=file, **kept)

        self._call(put)

    def write(self, name: str, data: bytes) -> None:
        """Write a result; S3's PUT is atomic."""
        self._call(partial(self._client.put_object, Bucket=self.bucket, Key=self._key(name), Body=data))

    def write_new(self, name: str, data: bytes) -> bool:
        """Write a result unless it exists (If-None-Match: *). On a store that ignores the condition, or does not take
        it, this always returns True; `history.honours_conditional_writes` detects such stores."""
        send = partial(self._client.put_object, Bucket=self.bucket, Key=self._key(name), Body=data)
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            try:
                send(IfNoneMatch="*")
            except boto_errors.ClientError as error:
                status, code = status_and_code(error)
                if status != NOT_IMPLEMENTED and code != "NotImplemented":
                    raise
                send()
            return True

        # A try that seemed to fail may have written the object: then the next one finds it there.
        return self._call(put, {FailureCode.CHANGED: False}) or (tries > 1 and self.read(name) == data)

    def delete(self, name: str) -> None:
        self._call(partial(self._client.delete_object, Bucket=self.bucket, Key=self._key(name)))

    def _key(self, name: str) -> str:
        return f"{self.prefix.rstrip('/')}/{name}" if self.prefix else name

    def _call(
        self, function: Callable[[], Result], expected: Mapping[FailureCode, Result] = MappingProxyType({})
    ) -> Result:
        """Call the function, with retries. `expected` gives the results for failures that are not errors here, such as
        None for an object that does not exist."""
        try:
            return call_boto(self._retries, f"{self.url}: the store", function, self._translate)
        except ObjectError as error:
            if error.code in expected:
                return expected[error.code]
            kind = ERROR_CLASSES.get(error.code, StoreError)
            raise kind(f"{self.url}: {error.message}; check its name and your rights (docs/scan.md)") from None

    def _translate(self, error: Exception) -> Exception:
        """Turn boto3's error into ours, without its text, which can contain keys, signed URLs and host names."""
        if isinstance(error, boto_errors.ClientError):
            return self._translate_reply(error)
        inner = error.kwargs.get("error") if isinstance(error, boto_errors.HTTPClientError) else error
        if isinstance(inner, RecursionError):
            # The store redirects without naming a region. boto3 asks for it, is redirected, asks for it, and so on.
            return self._other_region({})
        if translated := connection_error(self.url, error):
            return translated
        if isinstance(error, OSError) and error.errno in DISK_FULL:  # of this machine, while a download is written
            return OutageError(TEMPORARY_FULL)
        if isinstance(error, boto_errors.NoCredentialsError):
            return StoreError(
                f"{self.url}: there are no credentials; set AWS_ACCESS_KEY_ID or AWS_PROFILE (docs/scan.md)"
            )
        if isinstance(error, boto_errors.ParamValidationError):  # of all parameters, only the bucket's name is checked
            return StoreError(f"{self.url}: no bucket can have the name {self.bucket}; check it")
        if isinstance(error, boto_errors.EndpointProviderError):
            return StoreError(f"{self.url}: {NO_ADDRESS}")
        if isinstance(error, RuntimeError) and "credentials" not in str(error):
            return error  # it is no error of boto3's
        return StoreError(
            f"{self.url}: {type(error).__name__}; check credentials and region (docs/scan.md), and run again"
        )

    def _translate_reply(self, error: boto_errors.ClientError) -> Exception:
        status, code = status_and_code(error)
        if code.replace("_", "").lower() == "invalidobjectstate":
            return ObjectError(FailureCode.ARCHIVED, "the object is in cold storage; restore it first")
        if (status >= 500 and status != NOT_IMPLEMENTED) or status in BUSY_STATUS or code in BUSY_CODES:
            return TransientError(f"{status} {code}")
        if error.operation_name not in OPERATIONS:
            why = f"{error.operation_name}: {code}"
            return StoreError(f"{self.url}: the credentials cannot be renewed ({why}); renew them and run again")
        if code in REGION_CODES or 300 <= status < 400:
            return self._other_region(error.response)
        message = str(error.response.get("Error", {}).get("Message", ""))
        if status == 401 or CREDENTIAL_CODE.search(code) or "expired" in message:
            clock = ", or set this machine's clock," if "skewed" in code.lower() else ""
            return StoreError(
                f"{self.url}: the store refuses the credentials ({code}); renew them{clock} and run again"
            )
        if code == "NoSuchBucket":
            return StoreError(f"{self.url}: there is no bucket {self.bucket}; check its name and the store's address")
        if status == 404:
            return ObjectError(FailureCode.VANISHED, "the object was deleted after it was listed")
        if status == 412:
            return ObjectError(FailureCode.CHANGED, "the object was replaced after it was listed")
        if status == 409:
            return TransientError(f"{status} {code}")
        if status == 403:
            return ObjectError(FailureCode.ACCESS_DENIED, "access denied")
        return ObjectError(FailureCode.STORE_ERROR, f"the store answers {status} {code}")

    def _other_region(self, reply: Any) -> StoreError:
        region, asked = told_region(reply), self._client.meta.region_name
        where = (
            f"is in region {region}, not {asked}; set AWS_DEFAULT_REGION={region}"
            if region
            else (f"is not in region {asked}; set AWS_DEFAULT_REGION to its region")
        )
        return StoreError(f"{self.url}: the bucket {self.bucket} {where}, and --endpoint-url, if any, to its address")
