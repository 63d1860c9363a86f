"""Load, test and switch versions of a model on a running TorchServe.

The store holds `<name>-<version>.mar` for every version, and `<name>.mar`, a copy of the default version, which is
served after a restart.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from patchscan.common.errors import EXIT_INTERRUPTED, UserError
from patchscan.common.files import atomic_write, sha256_of
from patchscan.common.proxies import is_loopback
from patchscan.common.tokens import read_key, read_tokens
from patchscan.detector.card import Card
from patchscan.serving import golden
from patchscan.serving.archive import NAME, digest_file, names_in, write_digest
from patchscan.serving.server import ready_workers
from patchscan.serving.verify import Verified, verify

READY_TIMEOUT_S = 180.0
SMOKE_TRIES = 5
START = "start it with `patchscan serve`, or give its address"


class RegistryError(UserError):
    """The server refused, or the new version failed; the message says which version still serves."""


class AlreadyLoadedError(RegistryError):
    """Somebody else has just registered this version: what is loaded, and its file in the store, are theirs."""


class ChangingError(RegistryError):
    """Another command is changing the versions on this server; run the same command again when it has ended."""

    exit_code = EXIT_INTERRUPTED


class ServerDownError(RegistryError):
    """The server does not answer; run the same command again when it is back."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True)
class Loaded:
    """One version of one model on the server. `ready` of `workers` are READY; `waiting` requests are queued."""

    name: str
    version: str
    default: bool
    ready: int
    workers: int
    waiting: int
    file: str


class Registry:
    """A running server's models, through its management API (to load and switch) and inference API (to test)."""

    def __init__(self, management: httpx.Client, inference: httpx.Client, model_store: Path):
        self._management, self._inference, self.model_store = management, inference, model_store

    @classmethod
    def connect(cls, management: str, inference: str, keys: Path, token_file: Path | None, store: Path) -> "Registry":
        """Connect to both APIs. `keys` is TorchServe's key_file.json. Raises UserError if a key cannot be read."""
        try:
            key = read_key(keys, "management")
        except UserError as error:
            raise RegistryError(f"{error}: give the server's key_file.json with --keys") from error
        token = read_tokens(token_file or keys)[0]
        return cls(_client(management, key.encode()), _client(inference, token), store)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._management.close()
        self._inference.close()

    def register(self, mar: Path, workers: int) -> tuple[str, str]:
        """Verify an archive, load it beside the other versions, and run the smoke test. Returns its name and version.

        Raises VerifyError before the server is changed; RegistryError if the version is loaded already, the store has
        another archive of this version, or the version does not become ready or fails the smoke test. In the last two
        cases, and where the store cannot be written, it is removed again, but for files that were in the store before;
        not so a version that another `register` has loaded meanwhile.
        """
        verified = verify(mar)
        name, version = verified.card.name, verified.card.version
        if any((model.name, model.version) == (name, version) for model in self.status()):
            raise RegistryError(f"{name} {version} is loaded already; archive the new one with another --version")
        self._keep_default(name)
        stored = self.model_store / f"{name}-{version}.mar"
        if stored.exists() and sha256_of(stored) != verified.sha256:
            raise RegistryError(
                f"{stored} is another archive: archive the new one with another --version, or remove it"
            )
        made = [path for path in (stored, digest_file(stored)) if not path.exists()]
        try:
            with self._stored(verified, stored):
                pass
            self._load(verified, stored.name, workers)
        except AlreadyLoadedError:
            raise
        except BaseException:  # whatever it is, nothing is left of the version
            for path in made:
                path.unlink(missing_ok=True)
            raise
        return name, version

    def _load(self, verified: Verified, file_name: str, workers: int) -> None:
        """Load and test a version whose file is in the store; it is unloaded again where that fails."""
        name, version = verified.card.name, verified.card.version
        try:
            query = {"url": file_name, "initial_workers": workers, "synchronous": "true"}
            self._manage("POST", "/models", query)
            self._wait_ready(name, version, workers)
            self._smoke_test(verified)
        except AlreadyLoadedError:
            raise
        except BaseException:
            with suppress(httpx.HTTPError):  # the first error, which is raised again, is the one to report
                self._management.delete(f"/models/{name}/{version}")
            raise

    def promote(self, name: str, version: str) -> None:
        """Test a loaded version and make it the default, now and after a restart. Raises RegistryError."""
        versions = [model.version for model in self.status() if model.name == name]
        stored = self.model_store / f"{name}-{version}.mar"
        if version not in versions:
            known = ", ".join(versions) or "no version"
            load = f"; load it with `patchscan register {stored}`" if stored.exists() else ""
            raise RegistryError(f"{name} {version} is not loaded; the server has {known} of {name}{load}")
        self._keep_default(name)
        verified = verify(stored)
        if (verified.card.name, verified.card.version) != (name, version):
            raise RegistryError(f"{stored} holds {verified.card.name} {verified.card.version}")
        self._smoke_test(verified)
        with self._stored(verified, self.model_store / f"{name}.mar"):  # written before, named after
            self._manage("PUT", f"/models/{name}/{version}/set-default", {})

    def rollback(self, name: str, to: str | None) -> str:
        """Promote the version `to`, by default the only other version that is loaded. Returns it. Raises
        RegistryError."""
        candidates = [model.version for model in self.status() if model.name == name and not model.default]
        if to is None and not candidates:
            kept = self.model_store / f"{name}-VERSION.mar"
            raise RegistryError(f"no other version of {name} is loaded: load one with `patchscan register {kept}`")
        if to is None and len(candidates) > 1:
            found = ", ".join(candidates)
            raise RegistryError(f"which version of {name}? loaded besides the default: {found}; choose one with --to")
        version = to or candidates[0]
        self.promote(name, version)
        return version

    def status(self) -> list[Loaded]:
        """List all loaded versions of all models, sorted by name and version.

        A model that somebody else registered under a name such as `a/b` is left out: TorchServe finds it by no path.
        """
        found: list[Loaded] = []
        try:
            listed = [model["modelName"] for model in self._manage("GET", "/models", {"limit": 1000})["models"]]
            for name in filter(NAME.fullmatch, listed):
                default = self._manage("GET", f"/models/{name}", {})[0]["modelVersion"]
                versions = self._manage("GET", f"/models/{name}/all", {})
                found.extend(_loaded(described, default) for described in versions)
        except (LookupError, TypeError) as error:
            raise RegistryError(f"{self._management.base_url} is not TorchServe's management API") from error
        return sorted(found, key=lambda model: (model.name, model.version))

    def _keep_default(self, name: str) -> None:
        """Copy the default archive to its version's file name too, so that a rollback finds it. It is not verified
        here: one of an older patchscan, with other code, is kept too."""
        default = self.model_store / f"{name}.mar"
        if not default.exists():
            return
        _, version = names_in(default)
        if not NAME.fullmatch(version):
            raise RegistryError(f"{default} is of version {version!r}, which no file can be called by")
        copy = self.model_store / f"{name}-{version}.mar"
        if not copy.exists():
            with atomic_write(copy) as file:
                shutil.copyfile(default, file)
            write_digest(copy, sha256_of(copy))

    @contextmanager
    def _stored(self, verified: Verified, target: Path) -> Iterator[None]:
        """Copy a verified archive and its digest into the store, atomically, where the block succeeds; the copy is
        written before the block. Raises RegistryError where the file is no longer the one that was verified."""
        self.model_store.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(verified.mar):
            yield
        else:
            with atomic_write(target) as file:
                shutil.copyfile(verified.mar, file)
                if sha256_of(file) != verified.sha256:
                    raise RegistryError(f"{verified.mar} was replaced after it was verified: run the command again")
                yield
                digest_file(target).unlink(missing_ok=True)  # an archive without one is better than with another's
        write_digest(target, verified.sha256)

    def _wait_ready(self, name: str, version: str, workers: int) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            ready = ready_workers(self._described(name, version))
            if ready >= workers:
                return
            if time.monotonic() > deadline:
                raise RegistryError(f"{name} {version} had {ready} of {workers} workers READY; it is removed again")
            time.sleep(0.3)

    def _described(self, name: str, version: str) -> dict[str, Any]:
        """What the management API says of one version."""
        described = self._manage("GET", f"/models/{name}/{version}", {})
        if isinstance(described, list) and described and isinstance(described[0], dict) and "workers" in described[0]:
            return described[0]
        raise RegistryError(f"{self._management.base_url} is not TorchServe's management API")

    def _smoke_test(self, verified: Verified) -> None:
        """Send the golden images to this version through the inference API, and compare with the archive's answers."""
        card = verified.card
        on_gpu = any(worker.get("gpu") for worker in self._described(card.name, card.version)["workers"])
        tolerance = golden.GPU_LOGIT_TOLERANCE if on_gpu else golden.LOGIT_TOLERANCE
        if self._ask(card, b'{"card": true}', "application/json").get("engine") == "openvino-bf16":
            tolerance = golden.BF16_LOGIT_TOLERANCE
        found = golden.differences(verified.golden, lambda data: self._ask(card, data), tolerance)
        if found:
            failed = f"{card.name} {card.version} fails the smoke test, the old version still serves"
            raise RegistryError(f"{failed}: {'; '.join(found)}")

    def _ask(self, card: Card, data: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
        path = f"/predictions/{card.name}/{card.version}"
        for _ in range(SMOKE_TRIES):
            try:
                reply = self._inference.post(path, content=data, headers={"Content-Type": kind})
            except httpx.HTTPError as error:
                raise ServerDownError(f"{self._inference.base_url} does not answer ({error}): {START}") from error
            if reply.status_code < 500:
                break
            time.sleep(1)
        if reply.status_code != 200:
            raise RegistryError(f"{path} answers {reply.status_code}: {reply.text.strip()[:200]}")
        answer = _json_of(reply)
        if not isinstance(answer, dict):
            raise RegistryError(f"{self._inference.base_url} is not the inference API of `patchscan serve`")
        return answer

    def _manage(self, method: str, path: str, query: dict[str, Any]) -> Any:
        try:
            reply = self._management.request(method, path, params=query)
        except httpx.HTTPError as error:
            raise ServerDownError(f"{self._management.base_url} does not answer ({error}): {START}") from error
        if reply.status_code == 405:
            raise RegistryError("the server does not register models: start it with `patchscan serve --model-api`")
        content = _json_of(reply)
        if reply.status_code != 200:
            why = content.get("message") if isinstance(content, dict) else None
            told = why if isinstance(why, str) else reply.text
            kind = AlreadyLoadedError if (method, reply.status_code) == ("POST", 409) else RegistryError
            raise kind(f"the management API answers {reply.status_code}: {told.strip()[:300]}")
        if content is None:
            raise RegistryError(f"{self._management.base_url} is not TorchServe's management API")
        return content


@contextmanager
def only_change(keys: Path) -> Iterator[None]:
    """Keep other commands from changing versions on the server of this key file. Raises ChangingError where one does:
    a restart might else serve another version than the one that was promoted last."""
    with keys.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ChangingError("another `patchscan register`, promote or rollback runs: wait for its end") from error
        yield


def _client(url: str, secret: bytes) -> httpx.Client:
    """A client of one of the server's APIs. Raises RegistryError where the address is none, or the environment names a
    proxy that httpx does not know."""
    headers = {b"Authorization": b"Bearer " + secret}  # a token may be of any characters
    try:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host:
            raise httpx.InvalidURL(url)
        return httpx.Client(base_url=url, headers=headers, timeout=READY_TIMEOUT_S, trust_env=not is_loopback(url))
    except httpx.InvalidURL as error:
        raise RegistryError(f"{url} is not an address such as http://127.0.0.1:8081") from error
    except (ImportError, ValueError) as error:
        raise RegistryError(f"the proxy that the environment names cannot be used for {url}: {error}") from error


def _json_of(reply: httpx.Response) -> Any:
    """What a reply holds; None where that is no JSON, as the page of a proxy or of another server."""
    try:
        return reply.json()
    except ValueError:
        return None


def _loaded(described: dict[str, Any], default: str) -> Loaded:
    """Convert one entry of the management API's description of a model."""
    return Loaded(
        name=described["modelName"],
        version=described["modelVersion"],
        default=described["modelVersion"] == default,
        ready=ready_workers(described),
        workers=described["minWorkers"],
        waiting=described.get("jobQueueStatus", {}).get("pendingRequests", 0),
        file=described["modelUrl"],
    )
