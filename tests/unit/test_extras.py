"""A library that is missing is told with the extra that brings it."""

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from patchscan.common.extras import LIBRARIES, missing_library

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def distributions(requirements: list[str]) -> set[str]:
    """The names in a list of requirements, without versions and extras."""
    return {re.split(r"[\[=<>]", requirement)[0] for requirement in requirements}


@pytest.fixture(scope="module")
def providers() -> dict[str, set[str]]:
    """By library, the packages that bring it."""
    packages = packages_distributions().items()
    return {library: {name.lower().replace("_", "-") for name in names} for library, names in packages}


@pytest.mark.parametrize("extra", LIBRARIES)
def test_each_library_is_in_its_extra(extra: str, providers: dict[str, set[str]]) -> None:
    brought = distributions(PROJECT["optional-dependencies"][extra])
    assert [library for library in LIBRARIES[extra] if not brought & providers[library]] == []
    told = set().union(*(providers[library] for libraries in LIBRARIES.values() for library in libraries))
    assert brought - distributions(PROJECT["dependencies"]) <= told


def test_what_is_missing_is_named() -> None:
    missing = ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    assert missing_library(missing) == "this needs torch, which is not installed: pip install 'patchscan[train]'"


def test_a_bug_is_no_missing_extra() -> None:
    assert missing_library(ModuleNotFoundError("No module named 'patchscan.nowhere'", name="patchscan.nowhere")) is None
    assert missing_library(ImportError("cannot import name 'x'", name="torch")) is None
