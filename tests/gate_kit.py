"""The gate in front of a small upstream that stands where TorchServe is."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import web

from patchscan.common.errors import UserError
from patchscan.serving.gate import Gate, Listen, Tokens
from patchscan.serving.server import TorchServe

LOOPBACK = Listen(host="127.0.0.1", port=0)
GOOD = {"Authorization": "Bearer good"}


class Upstream:
    """Stands where TorchServe is: answers with `reply`, or how long a body it was sent, after `delay_s`, and has what a
    gate reads of it."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.waiting: list[str] = []
        self.running, self.starting, self.gone, self.rounds = True, False, False, 0
        self.answers = threading.Event()  # about models
        self.answers.set()
        self.seen: list[tuple[str, str, str]] = []
        self.bodies: list[bytes] = []
        self.reply: tuple[int, Any] | None = None

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.addresses = SimpleNamespace(inference_url=url, metrics_url=f"{url}/metrics")
        return runner

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(self.delay_s)
        self.bodies.append(body)
        self.seen.append((request.path, request.content_type, request.headers.get("Authorization", "")))
        status, content = self.reply or (200, {"bytes": len(body)})
        return web.json_response(content, status=status, headers={"X-Patchscan-Device": "cpu"})

    def token(self, kind: str) -> str:
        if self.starting:
            raise UserError("there is no key file yet")
        return f"its-{kind}-key"

    def versions(self, model: str) -> dict[str, int] | None:
        self.rounds += 1
        self.answers.wait(60)
        if self.gone:
            return None
        return {"1.0": 1, "2.0": 0} if model == "m" else {}

    def not_ready(self) -> list[str]:
        self.rounds += 1
        self.answers.wait(60)
        return self.waiting


def with_gate(tmp_path: Path, test: Callable[[Upstream, Gate, str], Awaitable[None]]) -> None:
    """Run `test` with an upstream, a gate whose token is `good`, and the gate's URL."""

    async def run() -> None:
        (tmp_path / "tokens").write_text("good\n")
        upstream = Upstream()
        runner = await upstream.start()
        gate = Gate(cast(TorchServe, upstream), Tokens(tmp_path / "tokens"))
        port, _ = await gate.start(LOOPBACK, LOOPBACK)
        try:
            await test(upstream, gate, f"http://127.0.0.1:{port}")
        finally:
            await gate.stop()
            await runner.cleanup()

    asyncio.run(run())
