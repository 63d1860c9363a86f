"""What the docs name exists: every `patchscan` command and option in them, every link, every recipe and make target."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from cli import app

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_store/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = typer.main.get_command(app)


def fenced_commands(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("  # ")[0] for line in lines if re.match(r"(\S*/)?patchscan ", line)]


CASES = [(page.name, line) for page in PAGES for line in fenced_commands(page)]


@pytest.mark.parametrize(("page", "line"), CASES, ids=[f"{page}: {line[:60]}" for page, line in CASES])
def test_a_documented_command_has_these_options(page: str, line: str) -> None:
    words = shlex.split(re.split(r" [|>&]|;", line)[0])[1:]
    command = COMMANDS
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands") or words[:1] in (["--help"], ["-h"]), f"no such command: {line}"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known | {"--help"}, f"unknown options {used - known}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [one for one in targets if "://" not in one and not (page.parent / one).exists()]
    assert missing == []


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS.commands if f"patchscan {name}" not in text] == []


def test_every_command_shows_an_example_in_its_help() -> None:
    without = []
    pending = [("patchscan", COMMANDS)]
    while pending:
        name, command = pending.pop()
        if hasattr(command, "commands"):
            pending += [(f"{name} {sub}", one) for sub, one in command.commands.items()]
        elif "Example" not in (command.help or ""):
            without.append(name)
    assert without == []


def test_every_dependency_is_listed_with_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[=<>]", one)[0] for group in groups for one in group}
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.+) \|$", page, flags=re.MULTILINE)
    listed = {name for cell, reason in rows for name in re.findall(r"`([\w-]+)`", cell + reason)}
    assert declared - listed == set()
    assert {name for cell, _ in rows for name in re.findall(r"`([\w-]+)`", cell)} - declared == set()
