"""Send the GET of an object as boto3 does, for less than half of its CPU time.

Most of boto3's time goes into composing each request anew and into describing its reply. So boto3 sends the first GET
of a bucket, and later ones are composed after its example: the same address and headers with another key, condition,
time and signature. They go through boto3's own connections (proxies, certificates, time limits), with its credentials
and its exceptions. A request is an example only where we compose it again to the letter, signature included: other
kinds of addresses and signatures stay boto3's. So does any object that the store neither gives nor plainly refuses,
as when it redirects to another region.
"""

import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from hmac import digest
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from botocore.awsrequest import AWSPreparedRequest
from botocore.endpoint import convert_to_response_dict
from botocore.exceptions import ClientError
from botocore.parsers import create_parser

from patchscan.storage.store import ObjectInfo

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials
    from botocore.session import Session

AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^ ]+/[0-9]{8}/([^/ ]+)/([^/ ]+)/aws4_request, SignedHeaders=([^ ]+), Signature=.+"
)
# The headers in which GETs differ.
CONDITION, TIME, TOKEN, SIGNATURE = "If-Match", "X-Amz-Date", "X-Amz-Security-Token", "Authorization"
# Another one, which is not signed: an id of the call, for whoever reads the store's log.
CALL_ID = "amz-sdk-invocation-id"
# Refusals that boto3 would pass on as they are. To others it may have an answer, such as the bucket's region.
FINAL_STATUS = {404, 412, 429, *range(500, 600)}
FINAL_CODE = {"AccessDenied", "InvalidObjectState"}


class Reply(NamedTuple):
    """The store's reply with an object: headers by their names in lower case, and the body, to be read in a `with`."""

    headers: Mapping[str, str]
    body: Any


class ObjectReader:
    """Gets objects with a boto3 client, from any number of threads. `session` made the client, `common` holds arguments
    for each `get_object`, and `count` is called before each GET that the client does not know of."""

    def __init__(self, client: Any, session: "Session", common: Mapping[str, Any], count: Callable[[], None]):
        self._client, self._session, self._common, self._count = client, session, common, count
        self._operation: Any = client.meta.service_model.operation_model("GetObject")
        self._example: Example | None = None
        self._sent = threading.local()
        client.meta.events.register("before-send.s3.GetObject", self._note)

    def get(self, info: ObjectInfo) -> Reply:
        """Ask for an object as it was listed. Raises what boto3's `get_object` raises."""
        return (self._example and self._get_alike(self._example, info)) or self._get_by_boto3(info)

    def _get_alike(self, example: "Example", info: ObjectInfo) -> Reply | None:
        """Ask as in the example; None where boto3 has to ask."""
        credentials = self._credentials()
        if bool(credentials.token) != example.has_token:
            return None
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        request = example.compose(info, credentials, now, str(uuid.uuid4()))
        self._count()
        reply = self._client._endpoint.http_session.send(request)
        if reply.status_code == 200:
            return Reply(reply.headers, reply.raw)
        answer = convert_to_response_dict(reply, self._operation)
        refusal = create_parser("rest-xml").parse(answer, self._operation.output_shape)
        if reply.status_code in FINAL_STATUS or refusal.get("Error", {}).get("Code") in FINAL_CODE:
            raise ClientError(refusal, "GetObject")
        return None

    def _get_by_boto3(self, info: ObjectInfo) -> Reply:
        condition: Any = {"IfMatch": f'"{info.etag}"'} if info.etag else {}
        version: Any = {"VersionId": info.version_id} if info.version_id else {}
        reply = self._client.get_object(Key=info.key, **condition, **version, **self._common)
        self._example = Example.of(self._sent.request, info, self._credentials)
        return Reply(reply["ResponseMetadata"]["HTTPHeaders"], reply["Body"])

    def _credentials(self) -> "ReadOnlyCredentials":
        """The client's credentials, renewed where they end soon. Only for requests that were signed: without any, boto3
        would look everywhere for them again."""
        credentials = self._session.get_credentials()
        assert credentials
        return credentials.get_frozen_credentials()

    def _note(self, request: AWSPreparedRequest, **_: Any) -> None:
        self._sent.request = request


@dataclass(frozen=True)
class Example:
    """What the GETs of a bucket have in common: the URL before the key, the headers, and the region and service for
    which the headers that `signed` names in lower case are signed."""

    address: str
    headers: Mapping[str, str]
    region: str
    service: str
    signed: frozenset[str]

    @classmethod
    def of(
        cls, sent: AWSPreparedRequest, info: ObjectInfo, credentials: "Callable[[], ReadOnlyCredentials]"
    ) -> "Example | None":
        """The example that boto3's request for an object gives, or None where ours for it would be another one."""
        headers = {name: value.decode() if isinstance(value, bytes) else value for name, value in sent.headers.items()}
        signature = AUTHORIZATION.fullmatch(headers.get(SIGNATURE, ""))
        if not signature or TIME not in headers:
            return None
        region, service, signed = signature.groups()
        example = cls(
            sent.url.removesuffix(_quoted(info)),
            {name: value for name, value in headers.items() if name not in {CONDITION, TIME, TOKEN, SIGNATURE}},
            region,
            service,
            frozenset(signed.split(";")) - {CONDITION.lower()},
        )
        ours = example.compose(info, credentials(), headers[TIME], headers.get(CALL_ID, ""))
        same = (ours.method, ours.url, ours.body) == (sent.method, sent.url, sent.body)
        return example if same and dict(ours.headers.items()) == dict(sent.headers.items()) else None

    @property
    def has_token(self) -> bool:
        """Whether the requests hold a session token."""
        return TOKEN.lower() in self.signed

    def compose(
        self, info: ObjectInfo, credentials: "ReadOnlyCredentials", now: str, call_id: str
    ) -> AWSPreparedRequest:
        """A signed request for an object; `now` is in the form of the header X-Amz-Date."""
        headers = {**self.headers, TIME: now}
        if CALL_ID in headers:
            headers[CALL_ID] = call_id
        if credentials.token:
            headers[TOKEN] = credentials.token
        if info.etag:
            headers[CONDITION] = f'"{info.etag}"'
        url = self.address + _quoted(info)
        headers[SIGNATURE] = self._authorization(url, headers, credentials)
        encoded: Any = {name: value.encode() for name, value in headers.items()}
        return AWSPreparedRequest("GET", url, encoded, body=None, stream_output=True)

    def _authorization(self, url: str, headers: Mapping[str, str], credentials: "ReadOnlyCredentials") -> str:
        """The header Authorization by AWS's Signature Version 4 (its User Guide: Create a signed AWS API request)."""
        parts = urlsplit(url)
        values = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
        values["host"] = parts.netloc.lower().removesuffix(":443" if parts.scheme == "https" else ":80")
        names = sorted(self.signed | {CONDITION.lower()} & values.keys())
        lines = "".join(f"{name}:{values.get(name)}\n" for name in names)
        signed, content = ";".join(names), values.get("x-amz-content-sha256")
        request = f"GET\n{parts.path}\n{parts.query}\n{lines}\n{signed}\n{content}"
        now = headers[TIME]
        scope = f"{now[:8]}/{self.region}/{self.service}/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        signature = digest(_signing_key(credentials.secret_key, scope), text.encode(), "sha256").hex()
        credential = f"{credentials.access_key}/{scope}"
        return f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={signed}, Signature={signature}"


def _quoted(info: ObjectInfo) -> str:
    """The key, and the version where there is one, as in a URL."""
    version = f"?versionId={quote(info.version_id, safe='~')}" if info.version_id else ""
    return quote(info.key, safe="/~") + version


@lru_cache(maxsize=8)
def _signing_key(secret: str, scope: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = digest(key, part.encode(), "sha256")
    return key
