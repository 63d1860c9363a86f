"""Find the control groups of this process, version 1 or 2, in which its limits of memory and CPU time stand."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups of a controller (`cpu`, `memory`), up to the root. In a container they
    begin at its own root."""
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        folder = root / path.lstrip("/")
        yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))
