"""docs/architecture.md draws the real imports, and modules depend on each other one way."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("bench", "cli", "demo", "detector", "evaluation", "handlers", "scanning", "training")
DRAWN = set(
    re.findall(r"^  (\w+)(?:\[.*?\])? -(?:- \".*?\" -)?-> (\w+)$", (ROOT / "docs/architecture.md").read_text(), re.M)
)
# `python -m training.train` is the command itself, begun by torchrun.
ENTRY = ("training.train", "cli")


def modules() -> dict[str, Path]:
    files = [ROOT / "cli.py", *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(file: Path, known: set[str], inside_functions: bool = True) -> set[str]:
    """The project's modules that a file imports, at its top alone or also inside functions."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or {node.module}
    return found & known


def test_the_drawing_shows_the_real_imports() -> None:
    known = modules()
    graph = {name: imports_of(file, set(known)) for name, file in known.items()}
    real = {
        (name.partition(".")[0], other.partition(".")[0])
        for name, others in graph.items()
        for other in others
        if (name, other) != ENTRY
    }
    assert {edge for edge in real if edge[0] != edge[1]} == DRAWN
    assert not [edge for edge in DRAWN if edge[0] == "detector"]


def test_no_chain_of_modules_leads_back() -> None:
    known = modules()
    graph = {name: imports_of(file, set(known), inside_functions=False) for name, file in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the chain
