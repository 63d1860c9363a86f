"""Files are written whole or not at all, whoever else writes them, with the rights of the umask."""

import ast
import os
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import patchscan
from patchscan.common.files import UnsafeNameError, atomic_write, safe_path
from patchscan.storage import copying, open_store
from patchscan.storage.store import StoreError, UnusableNameError


@pytest.fixture(params=[0o022, 0o027, 0o077])
def rights(request: pytest.FixtureRequest) -> Iterator[int]:
    """The rights of new files under this umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_of_many_writers_at_once_one_wins_and_none_leaves_half_a_file(tmp_path: Path) -> None:
    path, failures = tmp_path / "file", list[BaseException]()
    barrier = threading.Barrier(4)

    def write(value: int) -> None:
        try:
            for _ in range(8):
                barrier.wait(30)
                with atomic_write(path) as partial, partial.open("wb") as file:
                    for _ in range(20):
                        file.write(bytes([value]) * 1000)
                        file.flush()
                seen = path.read_bytes()
                assert len(seen) == 20_000
                assert len(set(seen)) == 1
        except BaseException as error:  # noqa: BLE001  the test's own thread asserts that there is none
            failures.append(error)
            barrier.abort()

    writers = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    assert names_in(tmp_path) == ["file"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:  # noqa: PT012
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (f".partial-{'0' * 32}", f".partial-{'1' * 32}", ".partial-mine"))
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    with atomic_write(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert set(names_in(tmp_path)) == {"file", new.name, other.name}


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with atomic_write(path) as partial:
        partial.write_text("long")
    assert path.read_text() == "long"


def test_written_files_have_the_rights_of_the_umask(tmp_path: Path, rights: int) -> None:
    with atomic_write(tmp_path / "plain") as partial:
        partial.write_text("text")
    with atomic_write(tmp_path / "tensors") as partial:
        save_file({"one": np.ones(3)}, partial)  # writes a file of its own, as 0600, over the one it is given
    store = open_store(str(tmp_path))
    store.write("result", b"1")
    store.write("result", b"2")
    assert store.write_new("claim", b"1")
    for name in ("plain", "tensors", "result", "claim"):
        assert (tmp_path / name).stat().st_mode & 0o777 == rights, name
    assert load_file(tmp_path / "tensors")["one"].tolist() == [1, 1, 1]


WRITES = re.compile(
    r".+\.(?:write_text|write_bytes|copyfile)|(?:.+\.)?save_file|(?:np|torch)\.save\w*|pq\.write_table|shutil.copy"
)
WRITES_ELSEWHERE = {
    "checkpoint.py: __init__": "a temporary folder",
    "decoders.py: run_child": "a switch of the kernel",
    "archive.py: _stage": "a temporary folder",
    "archive.py: _normalise": "the file of an atomic_write",
    "archive.py: _run_archiver": "a temporary folder",
    "golden.py: write": "a temporary folder",
    "inference_protocol.py: _npy": "memory",
    "listing.py: add_previous": "a temporary folder",
    "rows.py: table_to_parquet": "memory",
    "scorers.py: logits": "memory",
    "server.py: _lock_folder": "a lock, which is empty",
    "server.py: _write_kill": "a temporary folder",
    "server.py: start": "a temporary folder",
    "table.py: __init__": "a temporary folder",
    "torch_program.py: _run_child": "nowhere",
    "verify.py: _load": "a temporary folder",
}


def bare_writes(node: ast.AST, function: str = "") -> Iterator[str]:
    """The functions below `node` that write files outside `with atomic_write(...)`."""
    for child in ast.iter_child_nodes(node):
        within = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.With) and any("atomic_write(" in ast.unparse(item) for item in child.items):
            continue
        if isinstance(child, ast.Call):
            called = ast.unparse(child.func)
            opened = called.endswith(".open") and re.search(r"\('[wx]b?'", ast.unparse(child))
            if called != "pages.write_text" and (opened or WRITES.fullmatch(called)):
                yield within
        yield from bare_writes(child, within)


def test_every_writer_of_the_product_writes_whole_files() -> None:
    files = Path(patchscan.__file__).parent.rglob("*.py")
    found = {f"{file.name}: {one}" for file in files for one in bare_writes(ast.parse(file.read_text()))}
    assert found == set(WRITES_ELSEWHERE)


def test_of_many_writers_of_a_new_result_one_is_told_that_it_won(tmp_path: Path) -> None:
    store, won = open_store(str(tmp_path)), list[int]()
    barrier = threading.Barrier(8)

    def write(value: int) -> None:
        barrier.wait(30)
        if store.write_new("deep/claim", bytes([value])):
            won.append(value)

    writers = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [bytes(won)] == [store.read("deep/claim")]
    assert names_in(tmp_path / "deep") == ["claim"]


INSIDE = [
    "a",
    "a/b",
    "a b",
    "..a",
    "a..",
    ".a/b",
    "...",
    "ü/日本",
    "a\\b",
    "C:/x",
    "x" * 255,
    "a\nb",
    "%2e%2e/a",
    "caf\udce9",
]
UNSAFE = ["", "/", "/etc/passwd", "..", "../a", "a/../../b", "a/..", ".", "./a", "a/./b", "a//b", "//a", "a/", "a\0b"]
UNSAFE += ["x" * 256, "ü" * 128, "/".join(["x" * 200] * 25), "a\ud800"]


@pytest.mark.parametrize("name", INSIDE)
def test_a_safe_name_is_a_file_inside_the_folder(tmp_path: Path, name: str) -> None:
    path = safe_path(tmp_path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ascii(name))
    assert path.resolve().is_relative_to(tmp_path.resolve())
    assert path.read_text() == ascii(name)


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_is_no_file_inside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeNameError):
        safe_path(tmp_path, name)
    with pytest.raises(UnusableNameError):
        open_store(str(tmp_path / "inner")).write(name, b"x")
    with pytest.raises(UnusableNameError):
        open_store(str(tmp_path / "inner")).read(name)
    assert names_in(tmp_path) == []


class Objects:
    """A store of these objects by name; `fold` is how it compares names."""

    url = "memory"

    def __init__(self, objects: dict[str, bytes], fold: Callable[[str], str] = str):
        self.fold = fold
        self.objects = {fold(name): (name, data) for name, data in objects.items()}

    def names(self, prefix: str) -> list[str]:
        return [name for name, _ in self.objects.values()]

    def read(self, name: str) -> bytes | None:
        return self.objects.get(self.fold(name), (name, None))[1]

    def download(self, name: str, file: IO[bytes]) -> dict[str, str] | None:
        data = self.read(name)
        file.write(data or b"")
        return None if data is None else {}

    def write(self, name: str, data: bytes) -> None:
        self.objects[self.fold(name)] = name, data

    def upload(self, name: str, file: IO[bytes], headers: Mapping[str, str]) -> None:
        file.seek(0)
        self.write(name, file.read())

    def delete(self, name: str) -> None:
        del self.objects[self.fold(name)]


def copy_objects(monkeypatch: pytest.MonkeyPatch, source: Objects, target: Any) -> int:
    stores = {"source": source, "target": target}
    monkeypatch.setattr(copying, "open_store", lambda url, threads: stores[url])
    return copying.copy_tree("source", "target")


def test_copying_keeps_to_the_folder_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"a": b"1", "b/c": b"2", "d..e": b"3", "marked/x": b"4"}
    bad = dict.fromkeys(["../out", "b/../../out", "/out", "b//c", "b\0", "x" * 300, "./a", "full/"], b"bad")
    out = tmp_path / "out-folder"
    marks = {"marked/": b"", "": b""}  # the second one of the source itself, as the console of S3 makes it
    with pytest.raises(StoreError, match="8 of 14 objects could not be copied"):
        copy_objects(monkeypatch, Objects({**good, **bad, **marks}), open_store(str(out)))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == set(good)
    assert {name: (out / name).read_bytes() for name in good} == good
    assert names_in(tmp_path) == ["out-folder"]


def test_what_is_no_file_keeps_no_other_from_being_copied(tmp_path: Path) -> None:
    source = tmp_path / "from"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "sub/b").write_bytes(b"2")
    os.mkfifo(source / "pipe")
    (source / "dangling").symlink_to("nothing")
    (source / "up").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="3 of 5 objects could not be copied, the others were; first dangling") as left:
        copying.copy_tree(str(source), str(tmp_path / "to"))
    assert left.value.exit_code == 2
    assert sorted(names_in(tmp_path / "to")) == ["a", "sub"]
    for name in ("pipe", "dangling"):
        (source / name).unlink()
    with pytest.raises(StoreError, match=r"first up: .* a link to a folder, which is not followed"):
        copying.copy_tree(str(source), str(tmp_path / "to"))


def test_a_name_that_is_a_file_and_a_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="1 of 2 objects could not be copied"):
        copy_objects(monkeypatch, Objects({"a": b"1", "a/b": b"2"}), open_store(str(tmp_path)))


def test_names_that_differ_in_case_are_not_written_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {"A.jpg": b"1", "a.jpg": b"2", "ü": b"3", "u\u0308": b"4", "b": b"5"}
    exact = Objects({})
    assert copy_objects(monkeypatch, Objects(objects), exact) == 5
    assert dict(exact.objects.values()) == objects
    folding = Objects({}, str.casefold)
    with pytest.raises(StoreError, match=r"4 of 5 .*ignores case"):
        copy_objects(monkeypatch, Objects(objects), folding)
    assert list(folding.objects.values()) == [("b", b"5")]


def test_a_store_that_cannot_be_written_ends_the_copy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Objects):
        def write(self, name: str, data: bytes) -> None:
            raise StoreError("access denied")

    with pytest.raises(StoreError, match=r"^access denied$"):
        copy_objects(monkeypatch, Objects({"a": b"1", "b": b"2"}), Refusing({}))


def test_a_copy_holds_little_of_what_it_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "IN_MEMORY", 2**18)
    (tmp_path / "from").mkdir()
    for number in range(20):
        (tmp_path / "from" / str(number)).write_bytes(bytes([number]) * 2**22)
    tracemalloc.start()
    try:
        assert copying.copy_tree(str(tmp_path / "from"), str(tmp_path / "to")) == 20
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20, "of 80 MB"
    for number in range(20):
        assert (tmp_path / "to" / str(number)).read_bytes() == bytes([number]) * 2**22
