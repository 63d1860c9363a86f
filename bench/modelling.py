"""Measure models without decoding: images per second on all cores by engine, and the share of the machine's peak."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import int8
from bench.rounds import Recorder, Settings, alternate
from bench.workers import GEMM_SIDE, Job, WorkerPool
from patchscan.detector.detector import Detector
from patchscan.evaluation.precision import MIN_SHARE

PEAK = "matrix product of 1024 x 1024, float32"
ENGINES = {"default": "eager, PyTorch's defaults", "torch": "engine torch", "onnx": "engine onnx"}
if find_spec("openvino"):
    ENGINES["openvino"] = "engine openvino"


def names(settings: Settings) -> list[str]:
    """Every row of this section."""
    found = [PEAK]
    for model in settings.models:
        found += [f"{model}: {engine}" for engine in (*ENGINES.values(), "int8")]
        found += [f"{model}: engine onnx / eager, PyTorch's defaults", f"{model}: engine onnx, share of peak"]
        found += [f"{model}: int8 / engine onnx", f"{model}: int8, answers kept", f"{model}: int8, accuracies kept"]
    if {"ssp", "ssp-lite"} <= set(settings.models):
        found += ["ssp-lite / ssp, engine onnx"]
    return found


def measure(
    settings: Settings,
    per_core: WorkerPool,
    default: WorkerPool,
    runs: dict[str, Path],
    data: Path | None,
    folder: Path,
) -> Recorder:
    """Measure the engines of each model; int8 only if there are images to calibrate it on."""
    recorder = Recorder("model")
    if data is None:
        recorder.left_out("int8", "it is calibrated and judged on real images: give --data")
    onnx: dict[str, list[float]] = {}
    for model, run in runs.items():
        contenders: dict[str, Callable[[], float]] = {
            name: (default if engine == "default" else per_core).contender(Job(engine, run), settings.seconds)
            for engine, name in ENGINES.items()
        }
        contenders[PEAK] = per_core.contender(Job("gemm"), settings.seconds)
        if data is not None and model in settings.served:
            quantised = int8.quantise(run, data, folder)
            contenders["int8"] = per_core.contender(Job("int8", run, quantised), settings.seconds)
        values = alternate(contenders, settings.rounds)
        peak = [products * 2 * GEMM_SIDE**3 / 1e9 for products in values.pop(PEAK)]
        if not onnx:
            recorder.add(PEAK, "GFLOP/s", peak)
        for name, rates in values.items():
            recorder.add(f"{model}: {name}", "images/s", rates)
        onnx[model] = values[ENGINES["onnx"]]
        recorder.ratio(f"{model}: engine onnx / {ENGINES['default']}", onnx[model], values[ENGINES["default"]])
        cost = gflop(run)
        shares = [rate * cost / limit for rate, limit in zip(onnx[model], peak, strict=True)]
        recorder.add(f"{model}: engine onnx, share of peak", "share", shares)
        if data is not None and "int8" in values:
            recorder.ratio(f"{model}: int8 / engine onnx", values["int8"], onnx[model])
            _judge(recorder, model, run, quantised, data)
    if {"ssp", "ssp-lite"} <= onnx.keys():
        recorder.ratio("ssp-lite / ssp, engine onnx", onnx["ssp-lite"], onnx["ssp"])
    return recorder


def _judge(recorder: Recorder, model: str, run: Path, quantised: Path, data: Path) -> None:
    if Detector.load(run).card.training:
        kept = int8.judge(run, quantised, data)
        recorder.add(f"{model}: int8, answers kept", "share", [kept.answers], at_least=MIN_SHARE)
        recorder.add(f"{model}: int8, accuracies kept", "share", [kept.accuracies], at_least=1)
    else:
        recorder.left_out(f"{model}: int8, answers and accuracies kept", "the model is untrained")


def gflop(run: Path) -> float:
    """Count the floating-point operations for one image, in billions; a multiplication and an addition count as two."""
    detector = Detector.load(run)
    preset = detector.card.preset
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        detector.model(torch.zeros(preset.count, 3, preset.size, preset.size))
    return float(counter.get_total_flops()) / 1e9
