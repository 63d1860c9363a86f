"""What the documentation tells people to type, for the tests that run it or parse it."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_store/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HERE_DOCUMENT = re.compile(r"<<'(\w+)'\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
SUBSTITUTION = re.compile(r"(\w+)=\$\((.*)\)")
ASSIGNMENT = re.compile(r"\w+=\S*")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0][:60]}"


@dataclass(frozen=True)
class Command:
    """One command of a shell script: its words, and the here document it reads."""

    words: tuple[str, ...]
    stdin: str = ""

    def __str__(self) -> str:
        return shlex.join(self.words)[:90]

    @property
    def name(self) -> str:
        """The program, without its folder."""
        return Path(self.words[0]).name


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(page, *found) for found in FENCED.findall(page.read_text())]


def inline_code(page: Path) -> list[str]:
    """What stands in backticks outside fenced blocks, on one line each."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", page.read_text()))]


def commands(script: str) -> Iterator[Command]:
    """The simple commands of a script: joined lines, pipes, lists and substitutions taken apart, comments left out."""
    documents = [found[2] for found in HERE_DOCUMENT.finditer(script)]
    for line in HERE_DOCUMENT.sub("", script).replace("\\\n", " ").splitlines():
        if whole := SUBSTITUTION.fullmatch(line):
            yield from commands(whole[2])
            continue
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                given = [one for number, one in enumerate(words) if any(map(_plain, words[: number + 1]))]
                if given:
                    yield Command(tuple(given), documents.pop(0) if given[-1] == "-" and documents else "")
                words = []
            else:
                words.append(word)


def _plain(word: str) -> bool:
    """Not an assignment before a command."""
    return not ASSIGNMENT.fullmatch(word)
