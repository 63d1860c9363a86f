"""docs/architecture.md draws the real imports of the package, and imports lead one way: packages, modules, tests."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from patchscan.common.extras import LIBRARIES

ROOT = Path(__file__).parents[2]
DRAWN = set(
    re.findall(
        r"^  (\w+)(?:\[.*?\])? -(?:- \".*?\" -)?-> (\w+)$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
)
# `python -m patchscan` is the command.
ENTRY = {"__main__": "cli"}
TESTS = ROOT / "tests"


def modules(folder: str) -> dict[str, Path]:
    """The modules below a top-level folder, by their dotted names."""
    files = (ROOT / folder).rglob("*.py")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def import_statements(file: Path) -> list[ast.Import | ast.ImportFrom]:
    """Every import of a file, inside functions too."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(file: Path, known: set[str]) -> set[str]:
    """The known modules that a file imports."""
    found: set[str] = set()
    for node in import_statements(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or {node.module}
    return found & known


def imports(folder: str) -> dict[str, set[str]]:
    """Which module imports which other modules of the same top-level folder."""
    known = modules(folder)
    return {name: imports_of(file, set(known)) for name, file in known.items()}


def package_of(module: str) -> str:
    """`patchscan.scanning.plan` belongs to `scanning`, `patchscan.cli` to `cli`."""
    name = (*module.split("."), "patchscan")[1]
    return ENTRY.get(name, name)


def arrows() -> set[tuple[str, str]]:
    """Which package of patchscan imports from which other."""
    found = {(package_of(name), package_of(other)) for name, others in imports("patchscan").items() for other in others}
    return {(package, other) for package, other in found if package != other}


@pytest.mark.slow
def test_the_drawing_shows_the_real_imports() -> None:
    assert arrows() == DRAWN


def test_no_chain_of_packages_leads_back() -> None:
    found = arrows()
    graph = {package: {other for one, other in found if one == package} for package, _ in found}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the chain
    assert "common" not in graph, "everyone uses it, so it uses nobody"
    assert graph["detector"] == {"common"}, "it travels in every archive"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["patchscan", "bench", "demo", "tests"])
def test_no_chain_of_modules_leads_back(folder: str) -> None:
    TopologicalSorter(imports(folder)).prepare()


def test_tests_import_kits_and_no_other_tests() -> None:
    kits = {name for name in modules("tests") if not name.rpartition(".")[2].startswith("test_")}
    taken = {other for others in imports("tests").values() for other in others}
    assert taken <= kits


@pytest.mark.parametrize("folder", ["patchscan", "handlers", "bench", "demo"])
def test_what_is_not_a_test_imports_no_tests(folder: str) -> None:
    known = set(modules("tests"))
    assert {str(file) for file in (ROOT / folder).rglob("*.py") if imports_of(file, known)} == set()


@pytest.mark.parametrize("folder", ["patchscan", "handlers"])
def test_what_is_installed_imports_nothing_that_is_not(folder: str) -> None:
    known = {*modules("bench"), *modules("demo")}
    assert {str(file) for file in (ROOT / folder).rglob("*.py") if imports_of(file, known)} == set()


@pytest.mark.slow
def test_what_the_scan_image_runs_imports_no_library_of_the_extras() -> None:
    packages = ("cli", "common", "storage", "dataset", "scanning", "cluster", "reporting")
    names = [name for name in modules("patchscan") if package_of(name) in packages]
    names.remove("patchscan.dataset.image_facts")  # of `patchscan index`
    # What a scan with labels calls to evaluate its scores.
    evaluation = ("metrics", "calibration", "report", "results", "robustness", "disturbances", "evaluate")
    names += [f"patchscan.evaluation.{name}" for name in evaluation]
    libraries = {library for extra in ("train", "serve", "demo") for library in LIBRARIES[extra]}
    code = f"import sys, {', '.join(names)}; print(*{libraries} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "\n"


@pytest.mark.slow
def test_the_error_tree_names_every_exception() -> None:
    """What a module defines for its own use, behind an underscore, is left out."""
    drawn = set(re.findall(r"\w+Error\b|Exception", (ROOT / "patchscan/common/errors.py").read_text().split('"""')[1]))
    defined = {
        node.name
        for file in (ROOT / "patchscan").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_")
    }
    assert drawn - {"Exception", "ValueError"} == defined


@pytest.mark.parametrize("folder", ["patchscan", "handlers", "training", "bench", "demo"])
def test_shares_are_written_with_a_space_before_the_sign(folder: str) -> None:
    """As the reports write them, `5 %`; Python's own format would write `5.0%`."""
    assert [name for name, file in modules(folder).items() if re.search(r":[+.\d]*%\}", file.read_text())] == []
