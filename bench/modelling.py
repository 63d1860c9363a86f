"""Measure models without decoding: images per second on all cores by engine, and the share of the machine's peak."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.rounds import Recorder, Settings, alternate
from bench.workers import GEMM_SIDE, Job, WorkerPool
from patchscan.detector.detector import Detector
from patchscan.detector.openvino_detector import has_bf16

PEAK = "matrix product of 1024 x 1024, float32"
ENGINES = {"default": "eager, PyTorch's defaults", "torch": "engine torch", "onnx": "engine onnx"}
if find_spec("openvino"):
    ENGINES["openvino"] = "engine openvino"
    if has_bf16():
        ENGINES["openvino-bf16"] = "engine openvino-bf16"


def names(settings: Settings) -> list[str]:
    """Every row of this section."""
    found = [PEAK]
    for model in settings.models:
        found += [f"{model}: {engine}" for engine in ENGINES.values()]
        found += [f"{model}: engine onnx / eager, PyTorch's defaults", f"{model}: engine onnx, share of peak"]
    if {"ssp", "ssp-lite"} <= set(settings.models):
        found += ["ssp-lite / ssp, engine onnx"]
    return found


def measure(settings: Settings, per_core: WorkerPool, default: WorkerPool, runs: dict[str, Path]) -> Recorder:
    """Measure the engines of each model."""
    recorder = Recorder("model")
    onnx: dict[str, list[float]] = {}
    for model in settings.models:
        contenders: dict[str, Callable[[], float]] = {
            name: partial(
                (default if engine == "default" else per_core).rate, Job(engine, runs[model]), settings.seconds
            )
            for engine, name in ENGINES.items()
        }
        contenders[PEAK] = partial(per_core.rate, Job("gemm"), settings.seconds)
        values = alternate(contenders, settings.rounds)
        peak = [products * 2 * GEMM_SIDE**3 / 1e9 for products in values.pop(PEAK)]
        if not onnx:
            recorder.add(PEAK, "GFLOP/s", peak)
        for name, rates in values.items():
            recorder.add(f"{model}: {name}", "images/s", rates)
        onnx[model] = values[ENGINES["onnx"]]
        recorder.ratio(f"{model}: engine onnx / {ENGINES['default']}", onnx[model], values[ENGINES["default"]])
        cost = gflop(runs[model])
        shares = [rate * cost / limit for rate, limit in zip(onnx[model], peak, strict=True)]
        recorder.add(f"{model}: engine onnx, share of peak", "share", shares)
    if {"ssp", "ssp-lite"} <= onnx.keys():
        recorder.ratio("ssp-lite / ssp, engine onnx", onnx["ssp-lite"], onnx["ssp"])
    return recorder


def gflop(run: Path) -> float:
    """Count the floating-point operations for one image, in billions; a multiplication and an addition count as two."""
    detector = Detector.load(run)
    preset = detector.card.preset
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        detector.model(torch.zeros(preset.count, 3, preset.size, preset.size))
    return float(counter.get_total_flops()) / 1e9
