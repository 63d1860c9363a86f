"""List what TorchServe's one jar holds, as a CycloneDX document: `python requirements/sbom.py > torchserve-java.json`.

The jar is made of many, merged, without the files that name them. Netty, log4j, SLF4J and Groovy tell their versions in
it; the others are known by the packages of their classes only, and have no version here.
"""

import importlib.util
import json
import re
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Packages of classes, as paths, and the libraries that they are of (Maven's group and name); the longest path counts.
LIBRARIES = {
    "android/annotation": "com.google.android:annotations",
    "com/beust/jcommander": "com.beust:jcommander",
    "com/github/javaparser": "com.github.javaparser:javaparser-core",
    "com/google": "com.google.api.grpc:proto-google-common-protos",
    "com/google/common": "com.google.guava:guava",
    "com/google/errorprone": "com.google.errorprone:error_prone_annotations",
    "com/google/gson": "com.google.code.gson:gson",
    "com/google/j2objc": "com.google.j2objc:j2objc-annotations",
    "com/google/protobuf": "com.google.protobuf:protobuf-java",
    "com/google/thirdparty": "com.google.guava:guava",
    "com/lmax/disruptor": "com.lmax:disruptor",
    "com/thoughtworks/qdox": "com.thoughtworks.qdox:qdox",
    "groovy": "org.codehaus.groovy:groovy",
    "groovyjarjar": "org.codehaus.groovy:groovy",
    "io/grpc": "io.grpc:grpc-core",
    "io/grpc/netty/shaded": "io.grpc:grpc-netty-shaded",
    "io/netty": "io.netty:netty-all",
    "io/perfmark": "io.perfmark:perfmark-api",
    "io/prometheus/client": "io.prometheus:simpleclient",
    "javax/annotation": "com.google.code.findbugs:jsr305",
    "jline": "jline:jline",
    "junit": "junit:junit",
    "org/apache/commons/cli": "commons-cli:commons-cli",
    "org/apache/commons/compress": "org.apache.commons:commons-compress",
    "org/apache/commons/io": "commons-io:commons-io",
    "org/apache/groovy": "org.codehaus.groovy:groovy",
    "org/apache/logging": "org.apache.logging.log4j:log4j-core",
    "org/apache/logging/slf4j": "org.apache.logging.log4j:log4j-slf4j-impl",
    "org/apache/tools": "org.apache.ant:ant",
    "org/checkerframework": "org.checkerframework:checker-qual",
    "org/codehaus/groovy": "org.codehaus.groovy:groovy",
    "org/codehaus/mojo": "org.codehaus.mojo:animal-sniffer-annotations",
    "org/fusesource": "org.fusesource.jansi:jansi",
    "org/hamcrest": "org.hamcrest:hamcrest",
    "org/junit": "junit:junit",
    "org/junit/jupiter": "org.junit.jupiter:junit-jupiter-api",
    "org/junit/platform": "org.junit.platform:junit-platform-engine",
    "org/opentest4j": "org.opentest4j:opentest4j",
    "org/pytorch/serve": "org.pytorch:torchserve",
    "org/slf4j": "org.slf4j:slf4j-api",
    "org/testng": "org.testng:testng",
    "org/yaml/snakeyaml": "org.yaml:snakeyaml",
    "picocli": "info.picocli:picocli",
}


@dataclass(frozen=True)
class Library:
    """A library in the jar: Maven's group and name, its version where the jar tells it, and how many classes it has."""

    group: str
    name: str
    version: str | None
    classes: int


def installed_jar() -> Path:
    """Return the jar of the TorchServe that is installed here."""
    package = importlib.util.find_spec("ts")
    if package is None or package.origin is None:
        raise SystemExit("torchserve is not installed: pip install 'patchscan[serve]'")
    return Path(package.origin).parent / "frontend" / "model-server.jar"


def libraries(jar: Path) -> list[Library]:
    """Return the libraries that a TorchServe's jar holds. Raises ValueError for a class of none that is known."""
    with zipfile.ZipFile(jar) as archive:
        classes = Counter(_library_of(name) for name in archive.namelist() if _is_class(name))
        versions = _stated_versions(archive)
    return [Library(*key.split(":"), versions.get(key), count) for key, count in sorted(classes.items())]


def _is_class(name: str) -> bool:
    return name.endswith(".class") and not name.startswith("META-INF/") and name != "module-info.class"


def _library_of(name: str) -> str:
    found = [prefix for prefix in LIBRARIES if name.startswith(prefix)]
    if not found:
        raise ValueError(f"of which library is {name}? Add its package to LIBRARIES")
    return LIBRARIES[max(found, key=len)]


def _stated_versions(archive: zipfile.ZipFile) -> dict[str, str]:
    """The versions that the jar tells of the libraries in it."""
    netty, log4j, groovy = (
        archive.read(f"META-INF/{name}").decode()
        for name in ("io.netty.versions.properties", "DEPENDENCIES", "groovy-release-info.properties")
    )
    stated = {":".join(one[:2]): one[2] for one in re.findall(r"([\w.]+):([\w-]+):jar:(\S+)", log4j)}
    stated["org.apache.logging.log4j:log4j-slf4j-impl"] = stated["org.apache.logging.log4j:log4j-core"]
    found = re.search(r"^netty-common\.version=(.+)$", netty, re.MULTILINE)
    release = re.search(r"^ImplementationVersion=(.+)$", groovy, re.MULTILINE)
    assert found
    assert release
    stated |= {"io.netty:netty-all": found[1].strip(), "org.codehaus.groovy:groovy": release[1].strip()}
    stated["org.pytorch:torchserve"] = version("torchserve")
    return stated


def document(jar: Path) -> dict[str, Any]:
    """Return the CycloneDX document of a jar."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "file",
                "name": "ts/frontend/model-server.jar",
                "version": version("torchserve"),
                "hashes": [{"alg": "SHA-256", "content": sha256(jar.read_bytes()).hexdigest()}],
            }
        },
        "components": [_component(one) for one in libraries(jar)],
    }


def _component(library: Library) -> dict[str, Any]:
    at = f"@{library.version}" if library.version else ""
    component = {
        "type": "library",
        "group": library.group,
        "name": library.name,
        "purl": f"pkg:maven/{library.group}/{library.name}{at}",
        "properties": [{"name": "patchscan:classes", "value": str(library.classes)}],
    }
    return component | ({"version": library.version} if library.version else {})


if __name__ == "__main__":
    json.dump(document(installed_jar()), sys.stdout, indent=1)
