"""`patchscan register` against a management API that refuses: what it made is removed, and nothing else."""

import errno
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from patchscan.common import files
from patchscan.common.errors import UserError
from patchscan.common.files import digest_in, sha256_of
from patchscan.serving.archive import MANIFEST, archive, digest_file
from patchscan.serving.registry import Registry, RegistryError
from patchscan.serving.verify import Verified, VerifyError, verify
from tests.serving_kit import rewritten, tiny_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return archive(tiny_run(folder / "run"), folder)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def registry(store: Path) -> Iterator[Registry]:
    """Of a server that has no model yet and fails to load any."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": []})
        return httpx.Response(500, json={"message": "it does not load"})

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    with Registry(client, client, store) as made:
        yield made


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text('{"inference": {"key": "i"}, "management": {"key": "m"}}')
    return path


def refused(registry: Registry, mar: Path) -> None:
    with pytest.raises(UserError, match="it does not load"):
        registry.register(mar, 1)


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_a_copy_that_was_made_is_removed(registry: Registry, original: Path, store: Path) -> None:
    refused(registry, original)
    assert contents(store) == {}


@pytest.mark.parametrize("with_digest", [True, False])
@pytest.mark.parametrize("way", ["the file itself", "a link to it", "another name of it", "a copy of it"])
def test_the_operators_own_file_in_the_store_stays(
    way: str, with_digest: bool, registry: Registry, original: Path, store: Path, tmp_path: Path
) -> None:
    mine = store / "tiny-1.0.mar"
    mine.write_bytes(original.read_bytes())
    if with_digest:
        digest_file(mine).write_text(f"{verify(original).sha256}  tiny-1.0.mar\n")
    given, before = mine, contents(store)
    if way == "a link to it":
        given = tmp_path / "link.mar"
        given.symlink_to(mine)
    if way == "another name of it":
        given = tmp_path / "other.mar"
        given.hardlink_to(mine)
    if way == "a copy of it":
        given = original
    refused(registry, given)
    assert contents(store) == before


def test_a_copy_that_somebody_else_removed_does_not_hide_why(registry: Registry, original: Path, store: Path) -> None:
    def remove(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"models": []})
        for path in store.iterdir():
            path.unlink()
        return httpx.Response(500, json={"message": "it does not load"})

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(remove))
    with Registry(client, client, store) as made:
        refused(made, original)


@pytest.mark.parametrize("described", ["[]", "{}", '[{"x": 1}]', "<html>", "null"])
def test_whatever_the_server_answers_nothing_is_left_of_a_version(described: str, original: Path, store: Path) -> None:
    deleted: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            deleted.append(request.url.path)
        at_models = request.url.path == "/models"
        return httpx.Response(200, text='{"models": []}' if at_models else described)

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    with Registry(client, client, store) as made, pytest.raises(UserError, match="is not TorchServe's management API"):
        made.register(original, 1)
    assert (contents(store), deleted) == ({}, ["/models/tiny/1.0"])


def test_a_version_that_somebody_else_registers_meanwhile_stays(original: Path, store: Path) -> None:
    """Two `patchscan register` at once: both find no such version, and the server takes the faster one's."""
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(f"{request.method} {request.url.path}")
        if request.method == "GET":
            return httpx.Response(200, json={"models": []})
        return httpx.Response(409, json={"message": "Model version 1.0 is already registered for model tiny"})

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    with Registry(client, client, store) as made, pytest.raises(UserError, match="already registered"):
        made.register(original, 1)
    assert sent == ["GET /models", "POST /models"], "what the other one has loaded is not unloaded"
    assert set(contents(store)) == {"tiny-1.0.mar", "tiny-1.0.mar.sha256"}


def test_a_conflict_after_registering_leaves_nothing_of_the_version(original: Path, store: Path) -> None:
    """Only to the registering itself a 409 says that the version is somebody else's."""
    deleted: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            deleted.append(request.url.path)
        registered = request.url.path == "/models"
        return httpx.Response(200 if registered else 409, json={"models": []} if registered else {"message": "busy"})

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
    with Registry(client, client, store) as made, pytest.raises(RegistryError, match="answers 409: busy"):
        made.register(original, 1)
    assert (contents(store), deleted) == ({}, ["/models/tiny/1.0"])


def test_an_archive_that_is_replaced_after_it_was_verified_is_not_registered(
    registry: Registry, original: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.mar"
    given.write_bytes(original.read_bytes())

    def verified(mar: Path) -> Verified:
        found = verify(mar)
        given.write_bytes(b"what nobody has verified")
        return found

    monkeypatch.setattr("patchscan.serving.registry.verify", verified)
    with pytest.raises(UserError, match="was replaced after it was verified"):
        registry.register(given, 1)
    assert contents(store) == {}


def test_another_archive_of_this_version_is_not_replaced(registry: Registry, original: Path, store: Path) -> None:
    (store / "tiny-1.0.mar").write_bytes(b"the only copy of something else")
    with pytest.raises(UserError, match=r"tiny-1\.0\.mar is another archive"):
        registry.register(original, 1)
    assert contents(store) == {"tiny-1.0.mar": b"the only copy of something else"}


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_of_a_version(
    registry: Registry, original: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was full when the digest was to be written, after the archive."""
    monkeypatch.setattr("patchscan.serving.registry.write_digest", full_disk)
    with pytest.raises(OSError, match="No space left"):
        registry.register(original, 1)
    assert contents(store) == {}


def test_a_default_of_another_patchscan_is_kept_for_the_way_back(
    registry: Registry, original: Path, store: Path
) -> None:
    """After an upgrade, the archive that is served has other code than the installed version's."""
    manifest = zipfile.ZipFile(original).read(MANIFEST).replace(b'"1.0"', b'"0.9"')
    old = rewritten(original, store / "tiny.mar", {"patchscan/detector/answer.py": b"", MANIFEST: manifest})
    refused(registry, original)
    kept = store / "tiny-0.9.mar"
    assert kept.read_bytes() == old.read_bytes()
    assert digest_in(digest_file(kept).read_bytes()) == sha256_of(old)
    rewritten(original, old, {MANIFEST: manifest.replace(b"0.9", b"../x")})
    with pytest.raises(UserError, match="no file can be called by"):
        registry.register(original, 1)
    assert not list(store.parent.glob("*.mar"))


class Switching:
    """A server with the versions 0.9, its default, and 1.0 of `tiny`, and a store with those archives. `sent` are the
    requests that would change it."""

    def __init__(self, original: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
        self.sent: list[str] = []
        for name in ("tiny.mar", "tiny-0.9.mar", "tiny-1.0.mar"):
            (store / name).write_bytes(original.read_bytes())
        self.loaded = ["0.9", "1.0"]
        client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(self._answer))
        self.registry, self.status = Registry(client, client, store), 200
        monkeypatch.setattr(self.registry, "_smoke_test", lambda verified: None)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method != "GET":
            self.sent.append(f"{request.method} {request.url.path}")
            return httpx.Response(self.status, json={})
        if request.url.path == "/models":
            return httpx.Response(200, json={"models": [{"modelName": "tiny"}]})
        described = {"modelName": "tiny", "workers": [], "minWorkers": 1, "modelUrl": ""}
        return httpx.Response(200, json=[described | {"modelVersion": version} for version in self.loaded])


@pytest.fixture
def switching(original: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Switching:
    return Switching(original, store, monkeypatch)


def test_a_version_serves_and_outlives_a_restart_or_neither(
    switching: Switching, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old := store / "tiny.mar").write_bytes(rewritten(old, store / "x", {"note": b""}).read_bytes())
    (store / "x").unlink()
    before = contents(store)
    with monkeypatch.context() as full:
        full.setattr("patchscan.serving.registry.shutil.copyfile", full_disk)
        with pytest.raises(OSError, match="No space left"):
            switching.registry.promote("tiny", "1.0")
    assert (switching.sent, contents(store)) == ([], before)
    switching.status = 500
    with pytest.raises(UserError, match="answers 500"):
        switching.registry.promote("tiny", "1.0")
    assert contents(store) == before
    switching.status = 200
    switching.registry.promote("tiny", "1.0")
    assert switching.sent[1:] == ["PUT /models/tiny/1.0/set-default"]
    assert digest_in(digest_file(old).read_bytes()) == sha256_of(old) == sha256_of(store / "tiny-1.0.mar")


def test_an_archive_under_another_versions_name_is_not_promoted(
    switching: Switching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(mar: Path) -> Verified:
        found = verify(mar)
        return replace(found, card=replace(found.card, name="tiny-1.0", version="3.0"))

    monkeypatch.setattr("patchscan.serving.registry.verify", other)
    with pytest.raises(UserError, match=r"tiny-1\.0\.mar holds tiny-1\.0 3\.0"):
        switching.registry.promote("tiny", "1.0")
    assert switching.sent == []


@pytest.mark.parametrize("how", ["archive", "promote"])
def test_an_archive_never_stands_beside_anothers_digest(
    how: str, switching: Switching, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full when the archive, or its digest, was to be written out."""
    mar = store / "tiny.mar"
    digest_file(mar).write_text(f"{sha256_of(mar)}  tiny.mar\n")
    if how == "archive":
        sync = files._sync
        monkeypatch.setattr(files, "_sync", lambda path: full_disk() if path.stat().st_size > 10_000 else sync(path))
        with pytest.raises(OSError, match="No space left"):
            archive(tiny_run(tmp_path / "run", seed=1), store)
    else:
        rewritten(mar, store / "x", {"note": b""}).replace(mar)
        digest_file(mar).write_text(f"{sha256_of(mar)}  tiny.mar\n")
        monkeypatch.setattr("patchscan.serving.registry.write_digest", full_disk)
        with pytest.raises(OSError, match="No space left"):
            switching.registry.promote("tiny", "1.0")
    verify(mar)


def test_after_a_restart_the_way_back_is_told(switching: Switching, store: Path) -> None:
    switching.loaded = ["0.9"]
    with pytest.raises(UserError, match=r"no other version of tiny is loaded: .*register .*tiny-VERSION\.mar"):
        switching.registry.rollback("tiny", None)
    with pytest.raises(UserError, match=f"load it with `patchscan register {store}/tiny-1.0.mar`"):
        switching.registry.rollback("tiny", "1.0")
    switching.loaded = ["0.9", "1.0", "2.0"]
    with pytest.raises(UserError, match=r"besides the default: 1\.0, 2\.0; choose one"):
        switching.registry.rollback("tiny", None)


@pytest.mark.parametrize("text", ["", "\n", "  ", "no digest", "abc123  tiny.mar", "\xff", "0" * 65])
def test_a_digest_file_without_a_digest_is_one_line(text: str, original: Path, tmp_path: Path) -> None:
    mar = tmp_path / "tiny.mar"
    mar.write_bytes(original.read_bytes())
    digest_file(mar).write_text(text, "latin-1")
    with pytest.raises(UserError, match=r"tiny\.mar\.sha256 is damaged"):
        verify(mar)


def test_the_forms_of_a_digest() -> None:
    digest = "0123456789abcdef" * 4
    for text in (digest, f"{digest}  tiny.mar\n", f"{digest} *tiny.mar\r\n", f"\n{digest.upper()}\ttiny.mar"):
        assert digest_in(text.encode()) == digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"management": "k"}', '{"management": {"key": 7}}', "text"])
def test_a_key_file_of_another_form_is_one_line(text: str, tmp_path: Path) -> None:
    keys = tmp_path / "key_file.json"
    keys.write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*key_file\.json.*--keys"):
        Registry.connect("http://a", "http://b", keys, None, tmp_path)


@pytest.mark.parametrize("address", ["http://[::1", "http://a:b:c", "http://a:x", "a:8080", "127.0.0.1:8080", "a", ""])
def test_an_address_that_is_none_is_one_line(address: str, key_file: Path, tmp_path: Path) -> None:
    for management, inference in ((address, "http://b"), ("http://a", address)):
        with pytest.raises(UserError, match="is not an address"):
            Registry.connect(management, inference, key_file, None, tmp_path)


def test_a_token_may_be_of_any_characters(key_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("gööd\n", "utf-8")
    with Registry.connect("http://a", "http://b", key_file, tmp_path / "tokens", tmp_path) as made:
        (sent,) = (value for name, value in made._inference.headers.raw if name == b"Authorization")
    assert sent == b"Bearer " + "gööd".encode()


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1", "ftp://127.0.0.1:1"])
def test_a_proxy_of_an_unknown_kind_is_one_line_and_loopback_needs_none(
    proxy: str, key_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    Registry.connect("http://127.0.0.1:1", "http://[::1]:1", key_file, None, tmp_path)
    with pytest.raises(UserError, match="the proxy that the environment names cannot be used for http://a"):
        Registry.connect("http://a", "http://b", key_file, None, tmp_path)


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("content", ["<html>", "", "[]", "{}", "7", "null", '{"models": 7}', '{"message": ["x"]}'])
def test_another_server_at_the_address_is_one_line(status: int, content: str, tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=content))
    client = httpx.Client(base_url="http://server", transport=transport)
    with Registry(client, client, tmp_path) as made, pytest.raises(UserError, match=r"management API"):
        made.status()


def test_an_archive_without_the_answers_to_its_golden_images_is_refused(original: Path, tmp_path: Path) -> None:
    """Nothing would be compared, neither here nor on a server."""
    answers = json.loads(zipfile.ZipFile(original).read("golden/answers.json"))
    del answers["noise.bmp"]
    for text in ("{}", json.dumps(answers)):
        mar = rewritten(original, tmp_path / "tiny.mar", {"golden/answers.json": text.encode()})
        with pytest.raises(VerifyError, match="damaged answers: KeyError"):
            verify(mar)


def test_an_archive_with_files_that_its_directory_hides_is_refused(original: Path, tmp_path: Path) -> None:
    """TorchServe reads a zip from its start, without its directory: it would import what Python never sees."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("patchscan/detector/answer.py", b"import os\n")
        start = other.start_dir
    hidden, plain = file.getvalue()[:start], original.read_bytes()
    mar = tmp_path / "tiny.mar"
    mar.write_bytes(hidden + plain)
    with zipfile.ZipFile(mar) as seen, zipfile.ZipFile(original) as alone:
        assert seen.namelist() == alone.namelist()
    for data in (hidden + plain, plain[:-2] + b"\4\0note"):
        mar.write_bytes(data)
        with pytest.raises(VerifyError, match="may hide other files"):
            verify(mar)
