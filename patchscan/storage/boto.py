"""What the clients of S3 and SQS share: how they are made, and how boto3's errors become ours. Credentials come from
boto3's own chain and from nowhere else."""

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
    "IDPCommunicationError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
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
        raise StoreError(f"{url}: boto3 is not configured ({type(error).__name__}); see docs/scan.md") from error


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


def status_and_code(error: boto_errors.ClientError) -> tuple[int, str]:
    """The HTTP status (0 where there is none) and the service's error code of a refusal."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status, str(error.response.get("Error", {}).get("Code", ""))
