"""Turn somebody else's PyTorch program, a file of `torch.export.save` (.pt2) or TorchScript, into an ONNX model.

That is done in a child process, whose time and memory are limited and whose answer is only ever read as an ONNX file.
A TorchScript file is code that runs when it is loaded: before that, the child gives up opening files and connections.
PyTorch does not promise that a hostile file cannot break out of TorchScript's interpreter.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import warnings
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchscan.common.processes import end_with_parent
from patchscan.detector.graph_check import MAX_BYTES, GraphError, parse_graph
from patchscan.detector.onnx_detector import open_session
from patchscan.training.exported_program import OPSET, Program, read_program
from patchscan.training.import_config import Input

TIME_S = 900
# Bytes that the child may take: so many, and so many times the file's size.
MEMORY, COPIES = 3 * 2**30, 6
# Between the program's answers and those of the ONNX model, as a share of the largest.
LARGEST_DIFFERENCE = 1e-3


def to_onnx(path: Path, given: Input, time_s: int = TIME_S) -> bytes:
    """Return the program in a file as an ONNX model with one input, as `given` describes it. Raises GraphError where it
    cannot be converted within `time_s` seconds, or the two give other answers to two pictures."""
    kind = _kind_of(path)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run_child, args=(theirs, path, kind, given, time_s), daemon=True)
    child.start()
    theirs.close()
    try:
        with ours:
            failed, result = ours.recv_bytes() == b"failed", ours.recv_bytes(MAX_BYTES)
    except (EOFError, OSError):
        child.join()
        why = f"it took more than {time_s} s" if child.exitcode == -signal.SIGALRM else f"code {child.exitcode}"
        raise GraphError(
            f"{path} cannot be converted to ONNX: the process that did it ended ({why}); try torch.onnx.export"
        ) from None
    finally:
        child.kill()
        child.join()
    if failed:
        raise GraphError(result.decode(errors="replace"))
    return result


def _kind_of(path: Path) -> str:
    """`export` or `script`. Raises GraphError for other archives."""
    try:
        size = path.stat().st_size  # a zip's files are not all that it may hold
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise GraphError(f"{path} cannot be read: {error}") from error
    if max(size, sum(one.file_size for one in files)) > MAX_BYTES:
        raise GraphError(f"{path} has more than 2 GB")
    names = {one.filename.partition("/")[2] for one in files}
    if "constants.pkl" in names:
        return "script"
    if "archive_format" in names:
        return "export"
    if "data.pkl" in names:
        raise GraphError(f"{path} is a checkpoint: weights without a program; export the model to ONNX or torch.export")
    raise GraphError(
        f"{path} is no ONNX file, no TorchScript and no program of torch.export (torch 2.8 or later): export it to ONNX"
    )


def _run_child(pipe: Connection, path: Path, kind: str, given: Input, time_s: int) -> None:
    end_with_parent()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")  # of the exporter, which is deprecated: the new one needs a further package
    try:
        reply = b"converted", _convert(path, kind, given, time_s)
    except Exception as error:  # noqa: BLE001  torch and its exporter raise their own
        reply = b"failed", _one_line(path, error).encode()
    with contextlib.suppress(OSError):
        for part in reply:
            pipe.send_bytes(part)


def _one_line(path: Path, error: Exception) -> str:
    """An error in one line."""
    lines = str(error).partition("  [Caused by")[0].strip().splitlines() or [type(error).__name__]
    line = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]  # below its traceback
    if isinstance(error, GraphError):
        return line
    return f"{path} cannot be converted to ONNX here ({line}): try torch.onnx.export, where its source is"


def _convert(path: Path, kind: str, given: Input, time_s: int) -> bytes:
    """The file's program as an ONNX file; called in the child."""
    data = path.read_bytes()
    torch.set_num_threads(1)
    _prepare_exporter()
    _limit(len(data), time_s)
    program = read_program(path, data, given.sides) if kind == "export" else _load_script(data)
    dtype, names = torch.float32, None
    if isinstance(program, Program):
        dtype, names = program.dtype, program.outputs
    pictures = _pictures(given, dtype)
    with torch.inference_mode():
        alone = [_outputs(program(one[None])) for one in pictures]
        together = _takes_many(program, pictures, alone)
    names = names or [f"output{number}" for number in range(len(alone[0]))]
    graph = _export(program, pictures if together else pictures[:1], names, together)
    parse_graph(path, graph)
    _compare(path, graph, pictures, alone)
    return graph


def _prepare_exporter() -> None:
    """Have the exporter and ONNX Runtime import all that they import late, while files can be opened."""
    source = "def program(x, w0):\n    return torch.ops.aten.conv2d(x, w0).relu()\n"
    small = Program(source, [torch.ones(1, 3, 1, 1)], [None, 3, 8, 8], torch.float32, ["y"])
    _run(_export(small, torch.ones(2, 3, 8, 8), ["y"], together=True), torch.ones(2, 3, 8, 8))


def _limit(size: int, time_s: int) -> None:
    """Limit the time and memory of this process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(time_s)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY + COPIES * size,) * 2)


def _load_script(data: bytes) -> torch.nn.Module:
    """Load a TorchScript file, a stranger's code, after which this process can open no file and no connection."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    module: torch.nn.Module = torch.jit.load(io.BytesIO(data), "cpu").eval()
    return module


def _pictures(given: Input, dtype: torch.dtype) -> torch.Tensor:
    """Two test pictures of noise, prepared as the program's pictures will be: (2, 3, size, size), or channels last."""
    size = (2, given.size, given.size, 3)
    values = torch.randint(256, size, generator=torch.Generator().manual_seed(0)) * given.scale
    prepared = ((values - torch.tensor(given.mean)) / torch.tensor(given.std)).to(dtype)
    return prepared.permute(0, 3, 1, 2).contiguous() if given.layout == "nchw" else prepared


def _outputs(answer: Any) -> list[torch.Tensor]:
    return [answer] if isinstance(answer, torch.Tensor) else list(answer)


def _takes_many(program: torch.nn.Module, pictures: torch.Tensor, alone: list[list[torch.Tensor]]) -> bool:
    """Whether it gives several pictures at once the answers that each gets alone."""
    if any(one.ndim == 0 for answers in alone for one in answers):
        return False
    try:
        answers = _outputs(program(pictures))
    except RuntimeError:  # it was exported for one picture
        return False
    expected = [torch.cat(one) for one in zip(*alone, strict=True)]
    return all(
        one.shape == other.shape and _agree(one.numpy(), other.numpy())
        for one, other in zip(answers, expected, strict=True)
    )


def _export(program: torch.nn.Module, example: torch.Tensor, names: list[str], together: bool) -> bytes:
    """Return the program as an ONNX file, from `input` to outputs of these names."""
    axes = {name: {0: "count"} for name in ("input", *names)} if together else None
    file = io.BytesIO()
    torch.onnx.export(
        program,
        (example,),
        file,  # type: ignore[arg-type]  # the annotation names paths only
        input_names=["input"],
        output_names=names,
        dynamic_axes=axes,
        opset_version=OPSET,
        dynamo=False,
    )
    return file.getvalue()


def _run(graph: bytes, pictures: torch.Tensor) -> list[np.ndarray]:
    answers: list[np.ndarray] = open_session(graph).run(None, {"input": pictures.numpy()})
    return answers


def _compare(path: Path, graph: bytes, pictures: torch.Tensor, alone: list[list[torch.Tensor]]) -> None:
    """Raise GraphError where the graph's answers are not the program's."""
    for picture, expected in zip(pictures, alone, strict=True):
        for given, wanted in zip(_run(graph, picture[None]), expected, strict=True):
            if given.shape != tuple(wanted.shape) or not _agree(given, wanted.numpy()):
                raise GraphError(
                    f"{path} gives other answers than the ONNX model that was made of it: try torch.onnx.export"
                )


def _agree(values: np.ndarray, others: np.ndarray) -> bool:
    finite = others[np.isfinite(others)].astype(np.float64)
    largest = float(np.abs(finite).max(initial=0))
    return np.allclose(values, others, rtol=0, atol=LARGEST_DIFFERENCE * largest)
