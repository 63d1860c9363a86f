"""Refuse what the settings' ConfigMap holds and nothing reads, such as a misspelt name in an overlay: a scan would else
run with the default of the setting that was meant."""

import re
from collections.abc import Mapping
from difflib import get_close_matches

from patchscan.cluster.api_server import ClusterError
from patchscan.common.console import tell

# The manifests give a container each variable of the ConfigMap a second time, under this prefix: by its own name alone
# one could not tell it from what image and cluster set.
PREFIX = "SETTING_"
# All that there is to set in k8s/base/kustomization.yaml, for whichever pod.
SETTINGS = (
    *("MODEL", "MODEL_STORE", "VERSIONS", "SOURCE", "RESULTS", "EVENTS_FROM", "WORKERS"),
    *("PARALLELISM", "MIN_PARALLELISM", "WORKER_CPU", "WORKER_MEMORY", "QUEUE"),
    *("SHARD_OBJECTS", "SHARD_MB", "MAX_OBJECTS"),
)
# What libraries read, and may be set beside these.
LIBRARIES = re.compile(r"(AWS|OMP|SSL|REQUESTS|LC)_\w+|PYTHON\w+|(HTTPS?|NO|ALL)_PROXY|TZ|LANG", re.IGNORECASE)


def check_settings(environment: Mapping[str, str]) -> None:
    """Raise ClusterError where the ConfigMap has set a variable whose name is nearly a setting's. Others that nothing
    here reads are told of on standard error: a library may read them."""
    for name in sorted(variable.removeprefix(PREFIX) for variable in environment if variable.startswith(PREFIX)):
        if name not in SETTINGS and not LIBRARIES.fullmatch(name):
            text = f"the ConfigMap patchscan-settings: there is no setting {name}"
            if similar := get_close_matches(name.upper(), SETTINGS, 1):
                raise ClusterError(f"{text}; did you mean {similar[0]}?")
            tell(text)
