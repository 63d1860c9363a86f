"""Find out how much memory this process may still take: what its control groups and the machine have left."""

from pathlib import Path

from patchscan.common.cgroups import control_groups


def available_memory() -> int:
    """Return the bytes that may still be taken before the kernel kills for memory: the least of what is free in the
    control groups of this process (version 1 or 2) and on the machine. Pages of files that can be dropped are free."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(values["MemAvailable"].split()[0]) * 1024, *map(_free, control_groups("memory"))])


def _free(group: Path) -> int:
    """The bytes left in one group; more than any machine has where it states no limit."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (group / limit).read_text().strip()
            if most == "max":
                continue
            used = int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        return max(0, int(most) - used + int(stat[cached]))
    return 2**63
