"""The client's CPU time of a GET of 25 KB, by client, in turns: `python -m bench.gets`; `pip install obstore` first.

The server is a stub in a process of its own. `urllib3` signs nothing: it is what a client over urllib3 cannot go below.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection

import boto3
import obstore
import urllib3
from botocore.config import Config
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store

from bench.rounds import alternate, summary
from bench.s3_stub import SOURCE, S3Stub
from patchscan.storage import open_store
from patchscan.storage.store import ObjectInfo

ROUNDS, GETS, SIZE = 6, 150, 25_000
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}


def measure(url: str) -> None:
    """Print a line for each client: milliseconds a GET, median, least and greatest of the rounds."""
    objects = list(islice(open_store(f"s3://{SOURCE}", endpoint_url=url).objects(), GETS))
    clients = {"patchscan": _patchscan(url), "boto3": _boto3(url), "urllib3": _urllib3(url), "obstore": _obstore(url)}
    for name, times in alternate({name: partial(_ms, get, objects) for name, get in clients.items()}, ROUNDS).items():
        print(f"{name}: {summary(times)} ms")


def _ms(get: Callable[[ObjectInfo], bytes], objects: list[ObjectInfo]) -> float:
    """Milliseconds of CPU time a GET."""
    began = time.process_time()
    assert all(len(get(info)) == SIZE for info in objects)
    return 1e3 * (time.process_time() - began) / len(objects)


def _patchscan(url: str) -> Callable[[ObjectInfo], bytes]:
    store = open_store(f"s3://{SOURCE}", endpoint_url=url)
    return lambda info: store.fetch(info, 2**25).data


def _boto3(url: str) -> Callable[[ObjectInfo], bytes]:
    client = boto3.client("s3", endpoint_url=url, config=Config(user_agent="patchscan", parameter_validation=False))
    return lambda info: client.get_object(Bucket=SOURCE, Key=info.key, IfMatch=f'"{info.etag}"')["Body"].read()


def _urllib3(url: str) -> Callable[[ObjectInfo], bytes]:
    pool = urllib3.connection_from_url(url)
    return lambda info: pool.urlopen("GET", f"/{SOURCE}/{info.key}", headers={"If-Match": f'"{info.etag}"'}).data


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
