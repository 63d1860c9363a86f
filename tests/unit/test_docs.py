"""What the docs tell people to type can be typed: every fenced block is parsed to its end (a language or a program that
nothing here reads fails), and so is what stands in backticks: commands, options, paths. Links lead somewhere."""

import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from patchscan.cli import app
from patchscan.common.shipped import find_run
from patchscan.detector.answer import Answer
from tests.docs import PAGES, ROOT, Block, Command, blocks, commands, inline_code

PATCHSCAN: Any = typer.main.get_command(app)
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block.page, command) for block in BLOCKS if block.language == "sh" for command in commands(block.text)]
HELP = {"--help", "-h"}
MAKEFILE = (ROOT / "Makefile").read_text()
MANIFESTS = "\n".join(path.read_text() for path in sorted((ROOT / "k8s").rglob("*.yaml")))
# Addresses that docs/serve.md names; tests/functional/test_serving.py sends every curl to a real server.
CURLED = re.compile(
    r"http://(localhost|127\.0\.0\.1):(8080/(predictions/\w+(/[\d.]+)?|ping|readyz|livez|v2/health/(live|ready)"
    r"|v2/models/\w+(/ready|/infer)?|v1/models/\w+:predict)|8081/models\S*|8082/metrics)"
)


def find(words: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The `patchscan` command that these words name, and what follows its name."""
    command, rest = PATCHSCAN, list(words[1:])
    while hasattr(command, "commands") and rest and rest[0] not in HELP:
        assert rest[0] in command.commands, f"no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | HELP


def every_option(command: Any = PATCHSCAN) -> set[str]:
    below = getattr(command, "commands", {}).values()
    return options(command).union(*(every_option(one) for one in below))


def check_patchscan(command: Command) -> None:
    """Parsed as the program does: the command, its options, their types, and that nothing is missing."""
    found, rest = find(command.words)
    if not HELP & set(rest):
        found.make_context(found.name, rest)


def check_make(command: Command) -> None:
    for word in command.words[1:]:
        name, is_setting, _ = word.partition("=")
        if is_setting:
            assert re.search(rf"\$\({name}\)", MAKEFILE), f"the Makefile uses no {name}"
        else:
            wanted = word.replace(".venv", "$(VENV)")
            assert re.search(rf"^{re.escape(wanted)}:", MAKEFILE, re.MULTILINE), f"no target {word}"


def check_kubectl(command: Command) -> None:
    """Files exist, and what is named after us is named so in the manifests."""
    for flag, place in zip(command.words, command.words[1:], strict=False):
        assert flag not in ("-f", "-k") or (ROOT / place).exists(), f"{place} does not exist"
    ours = re.findall(r"(?:patchscan|train)-[\w-]+\b(?!\.yaml|/)", " ".join(command.words))
    assert [name for name in ours if name not in MANIFESTS] == []


def check_python(command: Command) -> None:
    """A program after -c or from standard input compiles; a module of ours is there and has these options."""
    if command.words[1:] == ("-",):
        compile(command.stdin, "documentation", "exec")
    elif command.words[1] == "-c":
        compile(command.words[2], "documentation", "exec")
    else:
        module = command.words[command.words.index("-m") + 1]
        assert importlib.util.find_spec(module), f"no module {module}"
        if module == "patchscan.training.launch":  # what follows its own options is told to another module
            second = command.words.index("-m", 3)
            assert command.words[second + 1] == "patchscan"
            check_patchscan(Command(command.words[second + 1 :]))
        else:
            given = {word.partition("=")[0] for word in command.words if word.startswith("--")}
            assert given <= module_options(module) | HELP, f"{module} has not all of {given}"


def module_options(module: str) -> set[str]:
    """The options of a module that is run with `python -m`: its strings that are one, and typer's parameters."""
    is_package = (ROOT / module.replace(".", "/") / "__main__.py").exists()
    found = importlib.util.find_spec(f"{module}.__main__" if is_package else module)
    assert found
    assert found.origin
    source = Path(found.origin).read_text()
    named = re.findall(r"\"(--[\w-]+)\"", source)
    typed = re.findall(r"^    (\w+): Annotated\[.*typer\.Option", source, re.MULTILINE)
    return {*named, *(f"--{name.replace('_', '-')}" for name in typed)}


def check_pytest(command: Command) -> None:
    for word in command.words[1:]:
        assert "/" not in word or (ROOT / word).exists(), f"{word} does not exist"


def check_curl(command: Command) -> None:
    addresses = [word for word in command.words if "://" in word]
    assert len(addresses) == 1
    assert CURLED.fullmatch(addresses[0]), f"nothing of ours answers at {addresses[0]}"


def check_printf(command: Command) -> None:
    assert command.words[-2] == ">"
    assert command.words[-1].endswith(".json"), "tests/functional/test_serving.py runs it before the curls"


CHECKS: dict[str, Callable[[Command], None]] = {
    "patchscan": check_patchscan,
    "make": check_make,
    "kubectl": check_kubectl,
    "python": check_python,
    "python3": check_python,
    "pytest": check_pytest,
    "curl": check_curl,
    "printf": check_printf,
}


def check_script(block: Block) -> None:
    for command in commands(block.text):
        assert command.name in CHECKS, f"nothing checks {command.name}: say how in CHECKS, or write it otherwise"


def check_text(block: Block) -> None:
    """A drawing of folders, say: nothing to type."""
    assert [line for line in block.text.splitlines() if line.split(" ")[0] in CHECKS] == []


def check_drawing(block: Block) -> None:
    """The one drawing is held to the imports by tests/unit/test_architecture.py."""
    assert block.page.name == "architecture.md"


def check_crontab(block: Block) -> None:
    """Five fields of time and a command of ours, in its folder; tests/functional/test_docs_import.py runs it."""
    for line in block.text.splitlines():
        assert re.match(r"([\d*/,-]+ ){5}cd \S+ && ", line)
        _, command = commands(line)
        check_patchscan(command)


LANGUAGES: dict[str, Callable[[Block], Any]] = {
    "sh": check_script,
    "json": lambda block: json.loads(block.text),
    "yaml": lambda block: list(yaml.safe_load_all(block.text)),
    "mermaid": check_drawing,
    "text": check_text,
    "crontab": check_crontab,
}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_fenced_block_is_read_by_something(block: Block) -> None:
    assert block.language in LANGUAGES, "name the block's language, one of LANGUAGES"
    LANGUAGES[block.language](block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_fence_escapes_the_reading(page: Path) -> None:
    assert len(re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page))


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.name}: {command}" for page, command in COMMANDS])
def test_a_documented_command_is_one_that_the_program_takes(page: Path, command: Command) -> None:
    CHECKS[command.name](command)


def examples(command: Any = PATCHSCAN, name: str = "patchscan") -> list[tuple[str, Command]]:
    """The commands after `Example:` in the help of each command."""
    below = getattr(command, "commands", {})
    found = [one for sub, other in below.items() for one in examples(other, f"{name} {sub}")]
    script = re.split(r"Examples?:\n", command.help or "")[1:]
    return [
        *found,
        *(
            (name, one)
            for part in script
            for one in commands(part.replace("\b", "").replace("$JOB_COMPLETION_INDEX", "0"))
        ),
    ]


def test_every_command_shows_examples_in_its_help_that_it_takes() -> None:
    shown = examples()
    for name, command in shown:
        CHECKS[command.name](command)
        assert shlex.join(command.words).startswith(name), f"the help of {name} shows {command}"
    pending, without = [("patchscan", PATCHSCAN)], []
    while pending:
        name, command = pending.pop()
        pending += [(f"{name} {sub}", one) for sub, one in getattr(command, "commands", {}).items()]
        if not hasattr(command, "commands") and name not in dict(shown):
            without.append(name)
    assert without == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_backticks_exist(page: Path) -> None:
    """They may leave out what the sentence is not about, so only what is named is looked for."""
    ours = every_option()
    for module in ("bench", "bench.scale_scan", "tests.soak"):
        ours |= module_options(module)
    for code in inline_code(page):
        if re.match(r"patchscan [a-z]", code):
            command, rest = find(tuple(shlex.split(code)))
            assert {word for word in rest if word.startswith("--")} <= options(command), code
        elif re.match(r"(make|kubectl|python|python3|(\w+=\w+ )?pytest) ", code):
            for command in commands(code):
                CHECKS[command.name](command)
        elif re.match(r"--\w", code):
            assert {word for word in code.split() if word.startswith("--")} <= ours, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_backticks_exist(page: Path) -> None:
    folders = "bench|demo|docs|handlers|k8s|model_store|patchscan|requirements|tests|training"
    named = [code for code in inline_code(page) if re.fullmatch(rf"({folders})[./][\w./*-]*", code)]
    assert [code for code in named if not (list(ROOT.glob(code)) or names_code(code))] == []


def names_code(name: str) -> bool:
    """Whether `package.module` is a module, or `package.module.thing` stands in one."""
    folder, _, last = name.rpartition(".")
    module, inside = (ROOT / one.replace(".", "/") for one in (name, folder))
    if module.is_dir() or module.with_suffix(".py").exists():
        return True
    return inside.with_suffix(".py").exists() and last in inside.with_suffix(".py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if "://" not in target:
            place, _, heading = target.partition("#")
            file = page.parent / place if place else page
            assert file.exists(), target
            assert not heading or heading in anchors(file), target


def anchors(page: Path) -> set[str]:
    """The names by which a link reaches this page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["scan", "archive", "explain", "scan-video", "case", "verify-case"])
def test_detectors_that_come_with_the_code_go_by_their_names(name: str) -> None:
    run = next(one for one in PATCHSCAN.commands[name].params if "--run" in one.opts or one.metavar == "RUN")
    assert run.type_descriptor.parameter_info.parser is find_run


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in PATCHSCAN.commands if f"patchscan {name}" not in text] == []


def test_a_page_with_a_command_for_openvino_names_its_extra() -> None:
    pages = {page for page, command in COMMANDS if "openvino" in command.words}
    assert pages
    assert [page for page in pages if not re.search(r"pip install '[^']*\[[\w,]*openvino\]'", page.read_text())] == []


def test_the_documented_answer_has_the_fields_of_an_answer() -> None:
    (shown,) = [block for block in BLOCKS if block.language == "json" and block.page.name == "serve.md"]
    assert json.loads(shown.text).keys() == {field.name for field in fields(Answer)}


def test_every_dependency_is_listed_with_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[=<>]", one)[0] for group in groups for one in group}
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.+) \|$", page, flags=re.MULTILINE)
    listed = {name for cell, reason in rows for name in re.findall(r"`([\w-]+)`", cell + reason)}
    assert declared - listed == set()
    assert {name for cell, _ in rows for name in re.findall(r"`([\w-]+)`", cell)} - declared == set()
