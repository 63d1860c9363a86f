"""Run an S3 server on this machine, for demos and tests: moto's, over HTTP on a free loopback port, credentials
checked.

It runs in a process of its own, keeps its objects in memory, and ends with the process that started it.
"""

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

from patchscan.common.console import say

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

REGION = "us-east-1"
# Unsigned calls that moto accepts: those that create the one user. Every later request must be signed by that user.
SETUP_CALLS = 3
ALLOW_ALL = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}


class EmbeddedS3:
    """A running server, as a context manager.

    `endpoint_url` is its address; `environment` holds the variables with which boto3 finds it, here or in a child
    process.
    """

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "patchscan.storage.embedded_s3"]
        environment = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": str(SETUP_CALLS)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert self.process.stdout
        self.endpoint_url = self.process.stdout.readline().decode().strip()
        self._access_key, self._secret_key = self._create_user()
        self._s3: S3Client = self._client("s3", self._access_key, self._secret_key)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def environment(self) -> dict[str, str]:
        """The variables of boto3's credential chain for this server's one user."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self) -> "S3Client":
        """A boto3 S3 client for this server, which any number of threads may share."""
        return self._s3

    def _create_user(self) -> tuple[str, str]:
        iam = self._client("iam", "setup", "setup")
        iam.create_user(UserName="patchscan")
        key = iam.create_access_key(UserName="patchscan")["AccessKey"]
        iam.put_user_policy(UserName="patchscan", PolicyName="all", PolicyDocument=json.dumps(ALLOW_ALL))
        return key["AccessKeyId"], key["SecretAccessKey"]

    def _client(self, service: str, access_key: str, secret_key: str) -> Any:
        import boto3

        session = boto3.Session(access_key, secret_key, region_name=REGION)
        return session.client(service, endpoint_url=self.endpoint_url)  # type: ignore[call-overload]


def _serve() -> None:
    """Serve until standard input closes, which happens when the parent process ends, even when it is killed."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    say(f"http://{host}:{port}")
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
