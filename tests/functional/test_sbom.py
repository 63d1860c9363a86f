"""`make sbom`: what TorchServe's jar holds."""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "requirements" / "sbom.py"
pytest.importorskip("ts", reason="needs TorchServe")


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sbom"] = module
    spec.loader.exec_module(module)
    return module


def test_the_installed_jar_is_listed_to_its_last_class(sbom: ModuleType) -> None:
    jar = sbom.installed_jar()
    found = {one.name: one for one in sbom.libraries(jar)}
    classes = [
        name
        for name in zipfile.ZipFile(jar).namelist()
        if name.endswith(".class") and "/" in name and not name.startswith("META-INF/")
    ]
    assert sum(one.classes for one in found.values()) == len(classes)
    assert {"gson", "snakeyaml", "grpc-netty-shaded", "protobuf-java"} <= found.keys()
    stated = {one.name: one.version for one in found.values() if one.version}
    assert stated == {
        "groovy": "3.0.9",
        "log4j-core": "2.17.1",
        "log4j-slf4j-impl": "2.17.1",
        "netty-all": "4.1.53.Final",
        "slf4j-api": "1.7.25",
        "torchserve": "0.12.0",
    }


def test_a_class_of_no_known_library_is_said(sbom: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jar", "w") as archive:
        archive.writestr("org/elsewhere/A.class", b"")
    with pytest.raises(ValueError, match=r"of which library is org/elsewhere/A\.class"):
        sbom.libraries(tmp_path / "a.jar")


def test_the_script_writes_cyclonedx() -> None:
    written = json.loads(subprocess.run([sys.executable, SCRIPT], capture_output=True, check=True).stdout)
    assert (written["bomFormat"], written["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"[0-9a-f]{64}", written["metadata"]["component"]["hashes"][0]["content"])
    assert "pkg:maven/io.netty/netty-all@4.1.53.Final" in {one["purl"] for one in written["components"]}
