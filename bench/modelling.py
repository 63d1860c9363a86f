"""Models alone, without decoding: images a second on all cores, by engine, and how near to the machine's own limit."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import int8
from bench.crew import GEMM_SIDE, Crew, Job
from bench.rounds import Recorder, Settings, alternate
from patchscan.detector.detector import Detector

PEAK = "matrix product of 1024 x 1024, float32"
ENGINES = {"default": "eager, PyTorch's defaults", "torch": "engine torch", "onnx": "engine onnx"}


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
    settings: Settings, ours: Crew, theirs: Crew, runs: dict[str, Path], data: Path | None, folder: Path
) -> Recorder:
    """Engines of each model in turn; int8 only where there are images to calibrate it on."""
    recorder = Recorder("model")
    if data is None:
        recorder.left_out("int8", "it is calibrated and judged on real images: give --data")
    onnx: dict[str, list[float]] = {}
    for model, run in runs.items():
        contenders: dict[str, Callable[[], float]] = {
            name: (theirs if engine == "default" else ours).contender(Job(engine, run), settings.seconds)
            for engine, name in ENGINES.items()
        }
        contenders[PEAK] = ours.contender(Job("gemm"), settings.seconds)
        if data is not None and model in settings.served:
            quantised = int8.quantise(run, data, folder)
            contenders["int8"] = ours.contender(Job("int8", run, quantised), settings.seconds)
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
        recorder.add(f"{model}: int8, answers kept", "share", [kept.answers], at_least=int8.SHARE)
        recorder.add(f"{model}: int8, accuracies kept", "share", [kept.accuracies], at_least=1)
    else:
        recorder.left_out(f"{model}: int8, answers and accuracies kept", "the model is untrained")


def gflop(run: Path) -> float:
    """Floating-point operations of one image in billions; a multiplication and an addition are two."""
    detector = Detector.load(run)
    preset = detector.card.preset
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        detector.model(torch.zeros(preset.count, 3, preset.size, preset.size))
    return float(counter.get_total_flops()) / 1e9
