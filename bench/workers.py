"""Worker processes that score images for the bench, with a chosen number of threads, allocator settings and engines.
They wait idle while something else is measured."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from unittest.mock import patch

import numpy as np

if TYPE_CHECKING:
    import torch

# The same settings as in patchscan/serving/server.py.
SERVER_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
EAGER_BATCH = 8
GEMM_SIDE = 1024


@dataclass(frozen=True)
class Job:
    """Work that a process repeats.

    `engine`: `gemm` (one matrix product of GEMM_SIDE), `default` (eager PyTorch with its default settings, EAGER_BATCH
    images per pass), `official` (SSP's own method, encoded image to logit), `torch`, `onnx`, `openvino`, or
    `openvino-bf16` (this project's engines).
    """

    engine: str
    run: Path | None = None


class WorkerPool:
    """A pool of `processes` worker processes, as a context manager. `threads` None keeps PyTorch's default."""

    def __init__(self, images: list[bytes], processes: int, threads: int | None, environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        with patch.dict(os.environ, environment):  # glibc reads its settings when the child starts
            for _ in range(processes):
                pipe, child_pipe = context.Pipe()
                process = context.Process(target=_serve, args=(child_pipe, threads), daemon=True)
                process.start()
                child_pipe.close()
                self._pipes.append(pipe)
                self._processes.append(process)
        for pipe in self._pipes:
            pipe.send(images)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)
            process.kill()

    def rate(self, job: Job, seconds: float) -> float:
        """Measure images (or matrix products) per second, all processes together."""
        for pipe in self._pipes:
            pipe.send((job, seconds))
        result: float = sum(pipe.recv() for pipe in self._pipes)
        return result


@contextmanager
def worker_pools(images: list[bytes], cores: int) -> Iterator[tuple[WorkerPool, WorkerPool]]:
    """Start two pools: one process per core with one thread and the server's allocator settings; and one process with
    PyTorch's default settings."""
    with WorkerPool(images, cores, 1, SERVER_ALLOCATOR) as per_core, WorkerPool(images, 1, None, {}) as default:
        yield per_core, default


def _serve(pipe: Connection, threads: int | None) -> None:
    import torch

    images: list[bytes] = pipe.recv()
    if threads:
        torch.set_num_threads(threads)
    ready: dict[Job, Callable[[], int]] = {}
    while True:
        try:
            job, seconds = pipe.recv()
        except EOFError:
            return
        if job not in ready:
            ready[job] = _start(job, images)
            ready[job]()
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds or not count:
            count += ready[job]()
        pipe.send(count / elapsed)


def _start(job: Job, images: list[bytes]) -> Callable[[], int]:
    """Return a function that does the job once and returns the number of images."""
    import torch

    if job.engine == "gemm":
        left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
        return lambda: len(torch.mm(left, right)) // GEMM_SIDE
    from bench import official
    from bench.peers.network import load
    from patchscan.detector.base import BaseDetector
    from patchscan.detector.detector import Detector
    from patchscan.detector.onnx_detector import OnnxDetector
    from patchscan.detector.onnx_export import export_graph
    from patchscan.detector.openvino_detector import OpenVinoBf16Detector, OpenVinoDetector

    assert job.run
    detector = Detector.load(job.run)
    crops = [detector.prepare(data).crops.pixels for data in images]
    number = cycle(range(len(images)))
    if job.engine in ("default", "official"):
        plain, _ = load(job.run)
        if job.engine == "official":
            return lambda: len(official.logits(plain, [images[next(number)] for _ in range(EAGER_BATCH)]))
        return lambda: _forward(plain, [crops[next(number)] for _ in range(EAGER_BATCH)])
    scorer: BaseDetector = detector
    if job.engine == "onnx":
        scorer = OnnxDetector(detector.card, export_graph(detector.model, detector.card.preset), threads=1)
    if job.engine.startswith("openvino"):
        kind = OpenVinoBf16Detector if job.engine == "openvino-bf16" else OpenVinoDetector
        scorer = kind(detector.card, export_graph(detector.model, detector.card.preset), threads=1)
    return lambda: len(scorer.logits([crops[next(number)]]))


def _forward(model: "torch.nn.Module", crops: list[np.ndarray]) -> int:
    """Run one forward pass over several images; returns how many."""
    import torch

    from patchscan.detector.presets import to_tensor

    with torch.inference_mode():
        model(to_tensor(np.concatenate(crops)))
    return len(crops)
