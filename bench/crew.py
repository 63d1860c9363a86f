"""Processes that score for the bench: as many as are asked for, each with its threads, its allocator and every engine
it was asked for; they wait while others are measured."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from unittest.mock import patch

import numpy as np

if TYPE_CHECKING:
    import torch

# As handlers/server.py starts its workers.
SERVER_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
EAGER_BATCH = 8
GEMM_SIDE = 1024


@dataclass(frozen=True)
class Job:
    """What a process can be asked to repeat. `engine`: `gemm` (one matrix product of GEMM_SIDE), `default` (eager
    PyTorch as it comes, EAGER_BATCH images a pass), `official` (the official way, encoded image to logit), `torch`,
    `onnx` (this project's engines) or `int8`, for which `file` is the quantised ONNX file."""

    engine: str
    run: Path | None = None
    file: Path | None = None


class Crew:
    """`processes` processes as a context manager. `threads` None leaves PyTorch its default."""

    def __init__(self, images: list[bytes], processes: int, threads: int | None, environment: dict[str, str]):
        context = multiprocessing.get_context("spawn")
        self._lines, self._crew = [], []
        with patch.dict(os.environ, environment):  # a child's allocator reads it before its first line runs
            for _ in range(processes):
                line, theirs = context.Pipe()
                member = context.Process(target=_serve, args=(theirs, threads), daemon=True)
                member.start()
                theirs.close()
                self._lines.append(line)
                self._crew.append(member)
        for line in self._lines:
            line.send(images)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines:
            line.close()
        for member in self._crew:
            member.join(30)
            member.kill()

    def rate(self, job: Job, seconds: float) -> float:
        """Images (or matrix products) a second, all processes together."""
        for line in self._lines:
            line.send((job, seconds))
        result: float = sum(line.recv() for line in self._lines)
        return result

    def contender(self, job: Job, seconds: float) -> Callable[[], float]:
        """`rate` as a contender of `alternate`."""
        return lambda: self.rate(job, seconds)


@contextmanager
def ours_and_theirs(images: list[bytes], cores: int) -> Iterator[tuple[Crew, Crew]]:
    """One process a core with one thread and the server's allocator; one process with PyTorch's defaults."""
    with Crew(images, cores, 1, SERVER_ALLOCATOR) as ours, Crew(images, 1, None, {}) as theirs:
        yield ours, theirs


def _serve(line: Connection, threads: int | None) -> None:
    import torch

    images: list[bytes] = line.recv()
    if threads:
        torch.set_num_threads(threads)
    ready: dict[Job, Callable[[], int]] = {}
    while True:
        try:
            job, seconds = line.recv()
        except EOFError:
            return
        if job not in ready:
            ready[job] = _start(job, images)
            ready[job]()
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds or not count:
            count += ready[job]()
        line.send(count / elapsed)


def _start(job: Job, images: list[bytes]) -> Callable[[], int]:
    """A function that does the job once and returns how many images that were."""
    import torch

    if job.engine == "gemm":
        left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
        return lambda: len(torch.mm(left, right)) // GEMM_SIDE
    from bench import official
    from patchscan.detector.detector import Detector
    from patchscan.detector.engines import OnnxModel, to_onnx
    from patchscan.detector.models import build_network
    from patchscan.detector.weights import read_safetensors

    assert job.run
    detector = Detector.load(job.run)
    crops = [detector.prepare(data).crops.pixels for data in images]
    turn = _turns(len(images))
    if job.engine in ("default", "official"):
        plain = build_network(detector.card.architecture).eval()
        plain.load_state_dict(read_safetensors(job.run / "model.safetensors"))
        if job.engine == "official":
            return lambda: len(official.logits(plain, [images[next(turn)] for _ in range(EAGER_BATCH)]))
        return lambda: _pass(plain, [crops[next(turn)] for _ in range(EAGER_BATCH)])
    if job.engine == "onnx":
        detector.model = to_onnx(detector.model, detector.card.preset)
    if job.file:
        detector.model = OnnxModel(str(job.file))
    return lambda: len(detector.logits([crops[next(turn)]]))


def _pass(model: "torch.nn.Module", crops: list[np.ndarray]) -> int:
    """One forward pass over several images; returns how many."""
    import torch

    from patchscan.detector.presets import to_tensor

    with torch.inference_mode():
        model(to_tensor(np.concatenate(crops)))
    return len(crops)


def _turns(count: int) -> Iterator[int]:
    while True:
        yield from range(count)
