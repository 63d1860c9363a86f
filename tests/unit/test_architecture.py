"""docs/architecture.md draws the real imports, and they lead one way: rooms (top-level packages) and modules alike."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = {"cli", *(file.parent.name for file in ROOT.glob("*/__init__.py"))} - {"tests"}
DRAWN = set(
    re.findall(r"^  (\w+)(?:\[.*?\])? -(?:- \".*?\" -)?-> (\w+)$", (ROOT / "docs/architecture.md").read_text(), re.M)
)
# `python -m patchscan.training.train` is the command itself, begun by torchrun.
ENTRY = ("patchscan.training.train", "cli")


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


def arrows() -> set[tuple[str, str]]:
    """Which room imports from which other, inside functions too."""
    known = modules()
    found = {
        (name.partition(".")[0], other.partition(".")[0])
        for name, file in known.items()
        for other in imports_of(file, set(known))
        if (name, other) != ENTRY
    }
    return {(room, other) for room, other in found if room != other}


def test_the_drawing_shows_the_real_imports() -> None:
    assert arrows() == DRAWN


def test_no_chain_of_rooms_leads_back() -> None:
    found = arrows()
    graph = {room: {other for one, other in found if one == room} for room in ROOMS}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the chain
    assert graph["detector"] == set()
    assert graph["storage"] == {"detector"}
    assert imports_of(ROOT / "console.py", set(modules())) == set(), "everyone uses it, so it uses nobody"


def test_no_chain_of_modules_leads_back() -> None:
    known = modules()
    graph = {name: imports_of(file, set(known), inside_functions=False) for name, file in known.items()}
    TopologicalSorter(graph).prepare()


def test_what_the_scan_image_runs_imports_no_torch() -> None:
    names = [name for name in modules() if name.partition(".")[0] in ("cli", "storage", "dataset", "scanning")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
