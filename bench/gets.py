"""The client's CPU time of a GET of 25 KB, by client, in turns: `python -m bench.gets`; `pip install obstore` first.

The server is a stub in a process of its own. `signed` is botocore's signature over urllib3, without the rest of boto3.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from statistics import median
from urllib.parse import quote

import boto3
import obstore
import urllib3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store

from bench.s3_stub import SOURCE, S3Stub
from patchscan.storage import open_store
from patchscan.storage.store import ObjectInfo

ROUNDS, GETS, SIZE = 3, 150, 25_000
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


def measure(url: str) -> None:
    """Print a line for each client: milliseconds a GET, median, least and greatest of the rounds."""
    objects = list(islice(open_store(f"s3://{SOURCE}", endpoint_url=url).objects(), GETS))
    clients = {"boto3": _boto3(url), "signed": _signed(url), "obstore": _obstore(url)}
    taken: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(ROUNDS + 1):
        for name in clients if number % 2 else list(clients)[::-1]:
            began = time.process_time()
            assert all(len(clients[name](info)) == SIZE for info in objects)
            taken[name].append(1e3 * (time.process_time() - began) / len(objects))
    for name, times in taken.items():
        least, *_, most = sorted(times[1:])  # the first round warms up
        print(f"{name}: {median(times[1:]):.2f} ms ({least:.2f} to {most:.2f})")


def _boto3(url: str) -> Callable[[ObjectInfo], bytes]:
    store = open_store(f"s3://{SOURCE}", endpoint_url=url)
    return lambda info: store.fetch(info, 2**25).data


def _signed(url: str) -> Callable[[ObjectInfo], bytes]:
    pool, session = urllib3.connection_from_url(url), boto3.Session()
    credentials = session.get_credentials()
    assert credentials
    signer = S3SigV4Auth(credentials.get_frozen_credentials(), "s3", session.region_name)

    def get(info: ObjectInfo) -> bytes:
        path = f"/{SOURCE}/{quote(info.key, safe='/~')}"
        request = AWSRequest("GET", url + path, headers={"If-Match": f'"{info.etag}"'})
        signer.add_auth(request)
        data: bytes = pool.urlopen("GET", path, headers=dict(request.headers)).data
        return data

    return get


def _obstore(url: str) -> Callable[[ObjectInfo], bytes]:
    signs = Boto3CredentialProvider(boto3.Session())
    store = S3Store(SOURCE, endpoint=url, credential_provider=signs, client_options={"allow_http": True})
    return lambda info: bytes(obstore.get(store, info.key, options={"if_match": f'"{info.etag}"'}).bytes())


def _serve(pipe: Connection) -> None:
    stub = S3Stub(GETS, [os.urandom(SIZE)])
    pipe.send(f"http://127.0.0.1:{stub.server_address[1]}")
    stub.serve_forever()


if __name__ == "__main__":
    os.environ.update(CREDENTIALS)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    measure(ours.recv())
