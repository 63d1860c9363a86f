"""What a tired operator gets wrong, each as a real command in a process of its own: one line that says what is wrong
and what to do, the exit code of docs/scan.md, nothing half-written, and success once it is mended."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from detector.card import Card
from handlers.archive import NAME_IS, archive
from storage.embedded_s3 import EmbeddedS3
from tests.image_tree import picture, write
from tests.scale_scan import Scorer
from tests.scan_kit import image
from tests.serving_kit import BIN, Served, can_unshare, environment, tiny_run, zip_of
from training.recipe import CONFIGS

Done = subprocess.CompletedProcess[str]
ANYWHERE = ["--inference", "127.0.0.1:0", "--management", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
TINY = """\
name: tiny
architecture: ssp-lite
preset: {kind: patch, rule: random, count: 4}
seen: [one]
epochs: 400
batch_size: 8
learning_rate: 1.0e-3
"""


def clean() -> dict[str, str]:
    """This process's environment, without anybody's credentials."""
    mine = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
    return mine | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", "HOME": "/nowhere"}


def patchscan(*arguments: str | Path, **variables: str) -> Done:
    command = [BIN / "patchscan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean() | variables, timeout=300)


def assert_one_line(done: Done, exit_code: int, *words: str) -> None:
    """The command ended with this code and one line on standard error, which holds these words."""
    assert done.returncode == exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("patchscan: ")
    assert [word for word in words if word not in line] == [], line
    assert done.stdout == ""


def files(folder: Path) -> set[str]:
    """Every file below a folder; none where there is none."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        (folder / f"{number}.png").write_bytes(image(number))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in GenImage's layout, indexed, with a recipe that takes long."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for number in range(8):
            real = picture(number)
            write(root / "one" / split / "nature" / f"{number}.png", real)
            write(root / "one" / split / "ai" / f"{number}.png", real // 16 * 16)
    (root / "tiny.yaml").write_text(TINY)
    assert patchscan("index", root).returncode == 0
    return root


@pytest.fixture(scope="module")
def s3(photos: Path) -> Iterator[EmbeddedS3]:
    """An S3 server whose bucket `photos` holds the photos; `results` is empty."""
    with EmbeddedS3() as server:
        for bucket in ("photos", "results"):
            server.client().create_bucket(Bucket=bucket)
        for path in photos.iterdir():
            server.client().put_object(Bucket="photos", Key=path.name, Body=path.read_bytes())
        yield server


def scorer(served: Served) -> list[str]:
    return ["--server", served.said["inference"], "--model", "tiny", "--token-file", str(served.token_file)]


@pytest.fixture(scope="module", autouse=True)
def waiting(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A scan through a TorchServe that is down. It tries for a minute: begun first, asked last."""
    out = tmp_path_factory.mktemp("down") / "out"
    command = [BIN / "patchscan", "scan", photos, "--out", out, "--server", "http://127.0.0.1:9", "--model", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean())
    yield process, out
    process.kill()
    process.communicate()


# -- the store -----------------------------------------------------------------------------------------------------


def test_a_wrong_bucket(s3: EmbeddedS3, served: Served, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = patchscan("scan", "s3://fotos", "--out", out, *scorer(served), **s3.environment)
    assert_one_line(done, 2, "s3://fotos: there is no bucket fotos", "check its name")
    assert files(out) == set()
    done = patchscan("scan", "s3://photos", "--out", "s3://result/x", *scorer(served), **s3.environment)
    assert_one_line(done, 2, "s3://result/x: there is no bucket result")
    assert "Contents" not in s3.client().list_objects_v2(Bucket="results")


def test_no_credentials(s3: EmbeddedS3, served: Served, tmp_path: Path) -> None:
    address = {"AWS_ENDPOINT_URL_S3": s3.endpoint_url, "AWS_DEFAULT_REGION": "us-east-1"}
    scan = ["scan", "s3://photos", "--out", str(tmp_path / "out"), *scorer(served)]
    assert_one_line(patchscan(*scan, **address), 2, "s3://photos: there are no credentials", "AWS_ACCESS_KEY_ID")
    unknown = s3.environment | {"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}
    assert_one_line(patchscan(*scan, **unknown), 2, "refuses the credentials (InvalidAccessKeyId)", "renew them")
    assert files(tmp_path / "out") == set()
    assert patchscan(*scan, **s3.environment).returncode == 0


def test_an_expired_session_of_the_store(served: Served, tmp_path: Path) -> None:
    """moto's sessions do not expire; this answers every request as S3 does then."""

    class Expired(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Expired) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), "x")
        address = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_address[1]}"}
        region = {"AWS_DEFAULT_REGION": "us-east-1"}
        out = tmp_path / "out"
        done = patchscan("scan", "s3://photos", "--out", out, *scorer(served), **keys, **address, **region)
        server.shutdown()
    assert_one_line(done, 2, "the store refuses the credentials (ExpiredToken); renew them and run again")
    assert files(out) == set()


def test_a_manifest_that_was_cut_off(photos: Path, served: Served, tmp_path: Path) -> None:
    listed = tmp_path / "keys.jsonl"
    listed.write_text('{"key": "0.png"}\n{"key": "1.p')
    scan = ["scan", photos, "--out", tmp_path / "out", "--manifest", listed, *scorer(served)]
    assert_one_line(patchscan(*scan), 2, f"the manifest {listed} cannot be read: Unterminated string")
    assert files(tmp_path / "out") == set()
    listed.write_text('{"key": "0.png"}\n')
    assert patchscan(*scan).returncode == 0


# -- the server ----------------------------------------------------------------------------------------------------


def test_a_misspelt_model_and_a_withdrawn_token(photos: Path, served: Served, tmp_path: Path) -> None:
    out, (server, address, *_) = tmp_path / "out", scorer(served)
    scan = ["scan", photos, "--out", out, server, address]
    done = patchscan(*scan, "--model", "tinny", "--token-file", served.token_file)
    assert_one_line(done, 2, f"{address} serves no model tinny", "`patchscan status`")
    (tmp_path / "old").write_text("withdrawn")
    done = patchscan(*scan, "--model", "tiny", "--token-file", tmp_path / "old")
    assert_one_line(done, 2, f"{address} refuses the token", "--token-file")
    done = patchscan(*scan, "--model", "tiny", "--token-file", tmp_path / "never")
    assert_one_line(done, 2, f"the token file {tmp_path / 'never'} cannot be read")
    assert files(out) == set()
    done = patchscan("serve", "tinny", "--model-store", served.store, "--scratch", tmp_path / "scratch", *ANYWHERE)
    assert_one_line(done, 2, f"{served.store}/tinny.mar does not exist (the store holds tiny", "`patchscan archive`")
    assert files(tmp_path / "scratch") == set()
    (tmp_path / "old").write_text(served.token_file.read_text())
    assert patchscan(*scan, "--model", "tiny", "--token-file", tmp_path / "old").returncode == 0


def test_a_server_that_is_down_for_its_operator(served: Served) -> None:
    """`register` is asked in test_management.py; a scan, which tries for a minute, below."""
    done = patchscan("status", "--management", "http://127.0.0.1:9", "--keys", served.keys)
    assert_one_line(done, 75, "http://127.0.0.1:9 does not answer", "`patchscan serve`")
    done = patchscan("status", "--management", served.said["management"], "--keys", "/nowhere/key_file.json")
    assert_one_line(done, 2, "/nowhere/key_file.json cannot be read", "--keys")


def test_java_is_missing(served: Served, tmp_path: Path) -> None:
    serve = ["serve", "--model-store", served.store, "--scratch", tmp_path / "scratch", *ANYWHERE]
    done = patchscan(*serve, PATH=str(BIN), JAVA_HOME="")
    assert_one_line(done, 2, "Java is missing: install Java 17", "apt-get install")
    done = patchscan(*serve, JAVA_HOME="/opt/no-such-java")
    assert_one_line(done, 2, "Java is missing (JAVA_HOME is /opt/no-such-java)")
    assert files(tmp_path / "scratch") == set()


def test_a_port_is_taken(photos: Path, served: Served, tmp_path: Path) -> None:
    serve = ["serve", "--model-store", served.store, "--scratch", tmp_path / "scratch", *ANYWHERE]
    stored = files(served.store)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        at = f"127.0.0.1:{port}"
        assert_one_line(patchscan(*serve, "--management", at), 2, f"port {port} (management) is in use")
        assert_one_line(patchscan(*serve, "--inference", at), 2, f"{at} cannot be listened on", "another port")
        assert_one_line(patchscan(*serve, "--metrics", at), 2, f"{at} cannot be listened on", "another port")
    assert files(served.store) == stored
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        scan = ["scan", photos, "--out", tmp_path / "out", *scorer(served), "--metrics-port", str(port)]
        done = patchscan(*scan)
    assert done.returncode == 2
    assert f"patchscan: --metrics-port {port} is not to be had" in done.stderr.splitlines()[-1]
    assert patchscan(*scan).returncode == 0, "the plan was kept, and the port is free now"


# -- runs, archives, recipes ---------------------------------------------------------------------------------------


def test_a_run_folder_without_a_card(run: Path, photos: Path, tmp_path: Path) -> None:
    """`evaluate` and `explain` are asked in test_evaluate.py."""
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "card.json").unlink()
    out, wrong = tmp_path / "out", f"{bare}/card.json is missing: is {bare} a run folder made by `patchscan train`?"
    for command in (
        ["scan", photos, "--run", bare, "--out", out],
        ["archive", bare, "--model-store", out],
    ):
        assert_one_line(patchscan(*command), 2, wrong)
        assert files(out) == set()


def test_weights_of_another_architecture(run: Path, photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    card = other / "card.json"
    card.write_text(card.read_text().replace('"ssp-lite"', '"simplecnn"'))
    done = patchscan("scan", photos, "--run", other, "--out", tmp_path / "out")
    assert_one_line(done, 2, f"{other}/model.safetensors does not hold what {other}/card.json says, a simplecnn")
    assert files(tmp_path / "out") == set()


def test_an_archive_of_another_version_a_damaged_and_a_foreign_one(run: Path, served: Served, tmp_path: Path) -> None:
    good = archive(run, tmp_path, version="2.0")
    with_other_code = tmp_path / "other" / "tiny.mar"
    with_other_code.parent.mkdir()
    data = good.read_bytes()
    at = data.index(b"class Answer")
    with_other_code.write_bytes(data)
    rewrite(with_other_code, "detector/answer.py", b"# of last year\n")
    cut, foreign = tmp_path / "cut.mar", tmp_path / "foreign.mar"
    cut.write_bytes(data[:at])
    foreign.write_bytes(zip_of({"MAR-INF/MANIFEST.json": b"{}", "resnet.pt": b"x"}))
    stored = files(served.store)
    for number, (mar, words) in enumerate(
        (
            (with_other_code, "carries other code than this version of patchscan: detector/answer.py. Make it anew"),
            (cut, "is not a model archive: File is not a zip file"),
            (foreign, "is compressed, so it was not made by `patchscan archive`"),
        )
    ):
        command = ["register", mar, *served.options()] if number == 0 else ["verify", mar]
        assert_one_line(patchscan(*command), 2, f"{mar} {words}")
    assert files(served.store) == stored
    for named in ([], ["store"]):
        store = tmp_path / "served"
        store.mkdir(exist_ok=True)
        shutil.copy(cut, store / "store.mar")
        done = patchscan("serve", *named, "--model-store", store, "--scratch", tmp_path / "scratch", *ANYWHERE)
        assert_one_line(done, 2, f"{store}/store.mar is not a model archive: take it out of the model store")
    assert files(tmp_path / "scratch") == set()


def rewrite(mar: Path, member: str, data: bytes) -> None:
    """Replace a member of a stored zip."""
    import zipfile

    with zipfile.ZipFile(mar) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(mar, "w", zipfile.ZIP_STORED) as new:
        for name, kept in (content | {member: data}).items():
            new.writestr(zipfile.ZipInfo(name), kept)


def test_a_name_that_is_a_path(run: Path, tmp_path: Path) -> None:
    done = patchscan("archive", run, "--name", "../ssp", "--model-store", tmp_path / "store")
    assert_one_line(
        done,
        2,
        f"an archive's name and version are {NAME_IS}, not '../ssp'",
    )
    assert files(tmp_path) == set()


def test_a_misspelt_key_in_a_recipe(data: Path, tmp_path: Path) -> None:
    recipe, run = tmp_path / "mine.yaml", tmp_path / "run"
    text, hint = (CONFIGS / "ssp-lite.yaml").read_text(), "; did you mean learning_rate?"
    for wrong, words in (
        (text.replace("learning_rate", "learning_rat"), "learning_rat: Extra inputs are not permitted" + hint),
        (text.replace("epochs:", "epochs"), "is not YAML"),
    ):
        recipe.write_text(wrong)
        done = patchscan("train", recipe, "--data", data, "--run", run)
        assert_one_line(done, 2, f"{recipe}", words)
        assert re.search(r"line \d+", done.stderr)
        assert files(run) == set()


# -- the disk ------------------------------------------------------------------------------------------------------


def on_a_full_disk(folder: Path, kilobytes: int, *arguments: str | Path) -> tuple[Done, set[str], int]:
    """Run a command whose output folder is a disk of this size, and again on a larger one: the first run, the files it
    left, and the second's exit code."""
    if not can_unshare():
        pytest.skip("this user may not mount a small disk")
    folder.mkdir()
    script = (
        f'mount -t tmpfs -o size={kilobytes}k small "$0"; "$@"; code=$?; find "$0" -type f -printf "file %P\\n"; '
        'mount -o remount,size=256m "$0"; "$@" > /dev/null 2> /dev/null; echo "again $?"; exit $code'
    )
    command = ["unshare", "-m", "sh", "-c", script, folder, BIN / "patchscan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean(), timeout=300)
    left = set(re.findall(r"^file (.*)$", done.stdout, re.MULTILINE))
    return done, left, int(re.findall(r"^again (\d+)$", done.stdout, re.MULTILINE)[0])


@pytest.mark.parametrize("kilobytes", [4, 40, 70])
def test_the_results_do_not_fit(kilobytes: int, photos: Path, served: Served, tmp_path: Path) -> None:
    """The disk is full at the plan, at the rows, and at the report."""
    out = tmp_path / "out"
    done, left, again = on_a_full_disk(out, kilobytes, "scan", photos, "--out", out, *scorer(served))
    assert done.returncode == 75, done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.match(rf"patchscan: {out}/\S+ cannot be written: No space left on device; mend that", line)
    assert "Traceback" not in done.stderr
    assert not [name for name in left if "partial" in name or name.endswith("_SUCCESS")]
    assert "report.html" not in left
    assert again == 0


def test_the_archive_does_not_fit(run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done, left, again = on_a_full_disk(store, 100, "archive", run, "--model-store", store)
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("patchscan: no space left on the disk, where it writes to or in /")
    assert (left, again) == (set(), 0)


def test_the_run_does_not_fit(data: Path, tmp_path: Path) -> None:
    """The disk has room for the weights, and none for the checkpoint."""
    run = tmp_path / "run"
    train = ["train", data / "tiny.yaml", "--data", data, "--run", run, "--device", "cpu", "--epochs", "1"]
    done, left, again = on_a_full_disk(run, 1000, *train, "--workers", "1")
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("patchscan: no space left on the disk")
    assert not left & {"card.json", "checkpoint.pt"}
    assert not [name for name in left if "partial" in name]
    assert again == 0


def test_the_evaluation_does_not_fit(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done, left, again = on_a_full_disk(out, 100, "evaluate", "--run", run, "--data", data, "--out", out)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("patchscan: no space left on the disk")
    assert not [name for name in left if "partial" in name or "report" in name]
    assert again == 0


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


class HangingScorer(Scorer):
    """Says its card, and scores nothing until it is told to."""

    go_on = threading.Event()
    asked = threading.Event()

    def do_POST(self) -> None:
        if self.headers["Content-Type"] != "application/json":
            self.asked.set()
            self.go_on.wait()
        super().do_POST()


def test_ctrl_c_twice_in_a_scan(photos: Path, tmp_path: Path) -> None:
    """The first lets what is under way end, the second does not wait for it."""
    out = tmp_path / "out"
    with ThreadingHTTPServer(("127.0.0.1", 0), HangingScorer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        scan = [BIN / "patchscan", "scan", photos, "--out", out, "--server", address, "--model", "stub"]
        process = subprocess.Popen(scan, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean())
        assert HangingScorer.asked.wait(60)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=10)[1]
        assert process.returncode == 75, told
        assert told.splitlines() == ["patchscan: ended at once; run the same command again"]
        assert not [name for name in files(out) if "partial" in name or "rows/part" in name]
        HangingScorer.go_on.set()
        assert patchscan(*scan[1:]).returncode == 0
        server.shutdown()
    assert len(list((out / "history").iterdir())) == 1, "the same scan went on"


def test_ctrl_c_while_a_bucket_is_listed(served: Served, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent.getsockname()[1]}", "AWS_DEFAULT_REGION": "x"}
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        scan = [BIN / "patchscan", "scan", "s3://photos", "--out", tmp_path / "out", *scorer(served)]
        process = subprocess.Popen(
            scan, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean() | address | keys
        )
        silent.settimeout(60)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=30)
        connection.close()
    assert_one_line(Done(scan, process.returncode, printed, told), 75, "run the same command again")
    assert files(tmp_path / "out") == set()


def test_ctrl_c_twice_in_a_training(data: Path, tmp_path: Path) -> None:
    """As a terminal sends it, to the loader's processes too. That the same command goes on: test_training.py."""
    run = tmp_path / "run"
    train = [BIN / "patchscan", "train", data / "tiny.yaml", "--data", data, "--run", run, "--device", "cpu"]
    process = subprocess.Popen(
        [*train, "--workers", "1"], stderr=subprocess.PIPE, text=True, env=clean(), start_new_session=True
    )
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("validation: epoch=1"):
            break
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    lines += process.stderr.read().splitlines()
    assert process.wait(60) == 75, lines
    assert not [line for line in lines if "Traceback" in line], "".join(lines)
    assert not [name for name in files(run) if "partial" in name or name == "card.json"]


@pytest.mark.parametrize("command", ["evaluate", "archive"])
def test_ctrl_c_twice_in_other_commands(command: str, run: Path, data: Path, tmp_path: Path) -> None:
    """Whatever it was doing at that moment."""
    own = tmp_path / "run"
    shutil.copytree(run, own)
    out = tmp_path / "out"
    arguments = {
        "evaluate": ["evaluate", "--run", own, "--data", data, "--out", out],
        "archive": ["archive", own, "--model-store", out],
    }[command]
    process = subprocess.Popen(
        [BIN / "patchscan", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:  # made when the work begins
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 75, told
    assert re.fullmatch(r"patchscan: (interrupted|ended at once); run the same command again", told.splitlines()[-1])
    assert "Traceback" not in told
    assert not [name for name in files(out) if "partial" in name or name.endswith(".mar")]
    assert Card.read(own).name == "tiny"


def test_torchserve_is_down(waiting: tuple[subprocess.Popen[str], Path]) -> None:
    process, out = waiting
    printed, told = process.communicate(timeout=120)
    done = Done(process.args, process.returncode, printed, told)
    assert_one_line(
        done, 75, "no TorchServe answers for tiny at http://127.0.0.1:9", "start it, or run the same command"
    )
    assert files(out) == set()
