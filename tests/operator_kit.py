"""What a tired operator gets wrong is tried as a real command in a process of its own: one line that says what is wrong
and what to do, the exit code of docs/scan.md, nothing half-written, and success once it is mended."""

from pathlib import Path

from tests import command
from tests.command import Done, environment
from tests.serving_kit import Served

ANYWHERE = ["--inference", "127.0.0.1:0", "--management", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]


def clean() -> dict[str, str]:
    """This process's environment, without anybody's credentials."""
    mine = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
    return mine | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", "HOME": "/nowhere"}


def patchscan(*arguments: object, **variables: str) -> Done:
    return command.patchscan(*arguments, env=clean() | variables)


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


def scorer(served: Served) -> list[str]:
    return ["--server", served.said["inference"], "--model", "tiny", "--token-file", str(served.token_file)]
