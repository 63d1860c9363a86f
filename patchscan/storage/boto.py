"""Make and call boto3's clients of S3 and SQS, and turn its errors into ours. Credentials come from boto3's own chain
and from nowhere else."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import boto3
import urllib3
from botocore import exceptions as boto_errors
from botocore.config import Config

from patchscan.common.retries import OutageError, Retries, TransientError
from patchscan.storage.store import StoreError

Result = TypeVar("Result")

BUSY_CODES = {
    "BandwidthLimitExceeded",
    "IDPCommunicationError",
    "InternalError",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
}
BUSY_STATUS = {408, 425, 429}
NO_ADDRESS = (
    "its server's address is none that boto3 takes; write --endpoint-url (or AWS_ENDPOINT_URL) as http://HOST:PORT, "
    "with no underscore in HOST"
)
# What is wrong with a connection by TLS that no further try can have.
TLS_ERROR = re.compile(r"\[SSL: (CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER)")
TLS_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": (
        "this machine does not trust the certificate at the store's address; check that, or set AWS_CA_BUNDLE to the "
        "file of its authority's certificate"
    ),
    "WRONG_VERSION_NUMBER": "there is no TLS at the store's address; write it with http://, or with another port",
}
# What http.client says of a header that it cannot send: an access key, token or region with a line break, as
# `echo KEY | base64` puts into a Secret.
HEADER_ERROR = "Invalid header value"
HEADER_ADVICE = (
    "no request can be sent: the access key, the session token or the region ends in a line break; write it without "
    "(in a Secret: `echo -n`)"
)
NETWORK_ERRORS = (
    boto_errors.HTTPClientError,
    boto_errors.ConnectionError,
    boto_errors.IncompleteReadError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
# What a call can raise: the last two where credentials are renewed (a file of a token is missing, they end at once).
CALL_ERRORS = (
    boto_errors.ClientError,
    boto_errors.BotoCoreError,
    urllib3.exceptions.HTTPError,
    OSError,
    RuntimeError,
)


def make_client(
    url: str, service: str, endpoint_url: str | None, region: str | None = None, core: Any = None, **settings: Any
) -> Any:
    """Make the boto3 client of a service for what lies at `url`; `core` is its botocore session, `settings` are
    further ones of botocore's Config.

    Raises StoreError where boto3 is not configured.
    """
    # boto3 does not retry: our own retries also cover the download of a body, and are counted in the row.
    config = Config(
        retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=60, user_agent="patchscan", **settings
    )
    try:
        session: Any = boto3.Session(botocore_session=core)
        return session.client(service, endpoint_url=endpoint_url, region_name=region, config=config)
    except (boto_errors.BotoCoreError, ValueError) as error:
        is_address = str(error).startswith("Invalid endpoint")
        why = NO_ADDRESS if is_address else f"boto3 is not configured ({type(error).__name__}); see docs/scan.md"
        raise StoreError(f"{url}: {why}") from error


def call_boto(
    retries: Retries, other_side: str, function: Callable[[], Result], translate: Callable[[Exception], Exception]
) -> Result:
    """Call boto3 with retries; `translate` turns its errors into ours. Raises what `translate` returns, or OutageError
    where that is still a TransientError at the end. `other_side` names the store or queue."""

    def attempt() -> Result:
        try:
            return function()
        except CALL_ERRORS as error:
            raise translate(error) from None

    try:
        return retries.call(attempt)[0]
    except TransientError as error:
        raise OutageError(f"{other_side} does not answer ({error}); run the same command again") from None


def connection_error(url: str, error: Exception) -> StoreError | TransientError | None:
    """Turn an error of the connection to a service, which messages call `url`, into ours, without its text, which can
    contain keys, signed URLs and host names: a StoreError where no further try can help. None for any other error."""
    if isinstance(error, boto_errors.HTTPClientError) and HEADER_ERROR in str(error):
        return StoreError(f"{url}: {HEADER_ADVICE}")
    if isinstance(error, boto_errors.SSLError) and (found := TLS_ERROR.search(str(error))):
        return StoreError(f"{url}: {TLS_ADVICE[found[1]]}")
    if not isinstance(error, NETWORK_ERRORS):
        return None
    is_unknown = isinstance(error, boto_errors.EndpointConnectionError)
    return TransientError(type(error).__name__ + (" (are its address and region right?)" if is_unknown else ""))


def status_and_code(error: boto_errors.ClientError) -> tuple[int, str]:
    """The HTTP status (0 where there is none) and the service's error code of a refusal."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status, str(error.response.get("Error", {}).get("Code", ""))
