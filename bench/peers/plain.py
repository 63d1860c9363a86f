"""A plain script of boto3, Pillow and PyTorch, as somebody writes it in an afternoon, with the starter's network: one
loop that reads a batch, decodes it, scores it with PyTorch's own threads, and writes CSV.

python -m bench.peers.plain BUCKET RUN SECONDS
"""

import csv
import os
import sys
from itertools import islice
from pathlib import Path

import boto3

from bench.peers import Meter
from bench.peers.network import load, score

BATCH = 8


def main(bucket: str, run: str, seconds: float) -> None:
    """Score for `seconds` after the first batch, which starts everything; print images per second."""
    s3, network = boto3.client("s3"), load(Path(run))
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = (one["Key"] for page in pages for one in page["Contents"])
    with Path(os.devnull).open("w") as file:
        rows, meter = csv.writer(file), Meter(seconds)
        while batch := list(islice(keys, BATCH)):
            bodies = [s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in batch]
            rows.writerows(zip(batch, score(network, bodies), strict=True))
            if meter.is_over(len(batch)):
                break
    meter.print_rates()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
