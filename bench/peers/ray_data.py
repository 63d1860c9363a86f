"""Ray Data's batch inference, as its guide has it: files read from S3, a class that holds the network on each core.

python -m bench.peers.ray_data BUCKET RUN SECONDS
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import torch

from bench.peers import Meter
from bench.peers.network import load, score
from patchscan.common.processes import available_cpus

BATCH = 8
# Of a core for each process with the network: the rest reads.
SHARE = 0.5
# A batch is given out when its block is scored; by default a block holds thousands of images.
BLOCKS = 1_000


class Scorer:
    """What each process runs."""

    def __init__(self, run: str):
        torch.set_num_threads(1)
        self.network = load(Path(run))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score a batch: the columns `path` and `bytes` become `path` and `p_ai`."""
        return {"path": batch["path"], "p_ai": np.array(score(self.network, batch["bytes"]))}


def main(bucket: str, run: str, seconds: float) -> None:
    """Score for `seconds` after the first batch; print images per second."""
    cores = available_cpus()
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    store = pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL_S3"].removeprefix("http://"), scheme="http"
    )
    files = ray.data.read_binary_files(bucket, filesystem=store, include_paths=True, override_num_blocks=BLOCKS)
    scored = files.map_batches(
        Scorer,
        fn_constructor_args=(run,),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=cores),
        num_cpus=SHARE,
    )
    meter = Meter(seconds)
    for batch in scored.iter_batches(batch_size=BATCH):
        if meter.is_over(len(batch["path"])):
            break
    meter.print_rates()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
