"""Measure a GPU: images per second scored in fp32, fp16 and compiled, and trained on in bfloat16; and the share that
fp16 reaches of its peak speed and memory bandwidth."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.modelling import gflop
from bench.rounds import Recorder, Settings, alternate
from patchscan.detector.detector import Detector
from patchscan.detector.presets import to_tensor
from patchscan.training.distributed import Ranks
from patchscan.training.learner import Learner
from patchscan.training.recipe import load_recipe

WAYS = ("fp32", "fp16", "fp16, compiled")
PEAK, BANDWIDTH = "matrix product of 8192 x 8192, fp16", "memory, copied"
GEMM_SIDE, COPIED = 8192, 2**28
CROPS = 256
TRAINED = "trained, bf16"


def names(settings: Settings) -> list[str]:
    """Every row of this section."""
    rows = (*WAYS, "fp16, share of peak", "fp16, share of memory", TRAINED)
    return [PEAK, BANDWIDTH, *(f"{model}: {row}" for model in settings.models for row in rows)]


def measure(settings: Settings, runs: dict[str, Path]) -> Recorder:
    """Batches of CROPS crops, already cut: what decoding would have to keep up with."""
    recorder = Recorder("gpu")
    if not torch.cuda.is_available():
        recorder.left_out("fp32, fp16, compiled, share of the GPU's peak", "there is no GPU here")
        return recorder
    square = torch.randn(GEMM_SIDE, GEMM_SIDE, device="cuda", dtype=torch.float16)
    block = torch.empty(COPIED, device="cuda", dtype=torch.uint8)
    limits: dict[str, Callable[[], float]] = {
        PEAK: lambda: _rate(lambda: torch.mm(square, square), 2 * GEMM_SIDE**3 / 1e9, settings.seconds),
        BANDWIDTH: lambda: _rate(block.clone, 2 * COPIED / 1e9, settings.seconds),  # read and written
    }
    reached = alternate(limits, settings.rounds)
    recorder.add(PEAK, "GFLOP/s", reached[PEAK])
    recorder.add(BANDWIDTH, "GB/s", reached[BANDWIDTH])
    for model in settings.models:
        detector = Detector.load(runs[model], "cuda")
        preset = detector.card.preset
        images = max(1, CROPS // preset.count)
        crops = torch.zeros(images * preset.count, preset.size, preset.size, 3, dtype=torch.uint8, device="cuda")
        ways = _ways(detector.model, crops, images, settings.seconds)
        values = alternate(ways, settings.rounds)
        for way in WAYS:
            recorder.add(f"{model}: {way}", "images/s", values[way])
        cost, moved = gflop(runs[model]), _bytes_moved(detector.model, crops) / images / 1e9
        pairs = list(zip(values["fp16"], reached[PEAK], reached[BANDWIDTH], strict=True))
        recorder.add(f"{model}: fp16, share of peak", "share", [rate * cost / peak for rate, peak, _ in pairs])
        recorder.add(f"{model}: fp16, share of memory", "share", [rate * moved / wide for rate, _, wide in pairs])
    for model in settings.models:
        step, images = _training_step(model)
        rates = alternate({model: partial(_rate, step, images, settings.seconds)}, settings.rounds)
        recorder.add(f"{model}: {TRAINED}", "images/s", rates[model])
    return recorder


def _training_step(model: str) -> tuple[Callable[[], object], int]:
    """A whole training step on a batch of the model's recipe, its crops already cut; and the batch's images."""
    recipe = load_recipe(model, seen=["made"], unseen=[], weights="none")
    learner = Learner(recipe, Ranks(0, 1, torch.device("cuda")), 1_000_000, "bf16")
    learner.model.train()
    count = recipe.batch_size * recipe.crops_per_image
    crops = torch.randint(256, (count, recipe.train_size, recipe.train_size, 3), dtype=torch.uint8)
    labels = torch.arange(count) % 2 * 1.0
    return partial(learner.step, crops.pin_memory(), labels.pin_memory(), 0), recipe.batch_size


def _ways(model: torch.nn.Module, crops: torch.Tensor, images: int, seconds: float) -> dict[str, Callable[[], float]]:
    compiled = torch.compile(model)

    @torch.inference_mode()
    def full() -> None:
        model(to_tensor(crops))

    @torch.inference_mode()
    def half(one: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.autocast("cuda", torch.float16):
            one(to_tensor(crops))

    runs: dict[str, Callable[[], object]] = {
        "fp32": full,
        "fp16": lambda: half(model),
        "fp16, compiled": lambda: half(compiled),
    }
    return {way: partial(_rate, run, images, seconds) for way, run in runs.items()}


def _rate(run: Callable[[], object], each: float, seconds: float) -> float:
    """Units per second of calling `run` (`each` units per call), with the GPU synchronised before and after."""
    run()
    torch.cuda.synchronize()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        run()
        count += 1
        torch.cuda.synchronize()
    return count * each / (time.perf_counter() - began)


@torch.inference_mode()
def _bytes_moved(model: torch.nn.Module, crops: torch.Tensor) -> float:
    """Bytes that one pass in fp16 must at least move: the weights once, every layer's output written and read."""
    moved = sum(2.0 * one.numel() for one in model.parameters())

    def count(_: torch.nn.Module, __: object, output: object) -> None:
        nonlocal moved
        if isinstance(output, torch.Tensor):
            moved += 2 * 2 * output.numel()

    layers = [one for one in model.modules() if not list(one.children())]
    hooks = [one.register_forward_hook(count) for one in layers]
    model(to_tensor(crops))
    for hook in hooks:
        hook.remove()
    return moved
