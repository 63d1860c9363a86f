"""Alerts and the dashboard of scans and roll-outs: they ask for names that exist, fire when they should, and are
explained."""

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client import REGISTRY

from patchscan.scanning.observers import MetricsObserver
from patchscan.serving.gate import Gate, Tokens
from patchscan.serving.server import TorchServe

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s/overlays/monitoring"
RULE = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
RULES = [rule for group in RULE["spec"]["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
# https://github.com/kubernetes/kube-state-metrics/tree/main/docs/metrics/workload
KUBE_STATE_METRICS = {
    "kube_cronjob_created": {"cronjob"},
    "kube_cronjob_status_last_successful_time": {"cronjob"},
    "kube_deployment_spec_replicas": {"deployment"},
    "kube_deployment_status_replicas_available": {"deployment"},
    "kube_job_failed": {"job_name", "condition"},
}


def exported() -> set[str]:
    """The names that a scan's worker and the gate before TorchServe export."""
    with contextlib.suppress(ValueError):  # another test of this process has made one
        MetricsObserver(0)
    registries = (REGISTRY, Gate(cast(TorchServe, None), Tokens(Path("none")))._registry)
    families = [family for registry in registries for family in registry.collect()]
    # A label's sample appears with its first value: a counter's name is its family's and _total.
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    return counters | {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_every_name_in_a_query_is_exported(query: str) -> None:
    asked = set(re.findall(r"\b(?:patchscan|kube)_\w+", re.sub(r'"[^"]*"', '""', query)))
    assert asked
    assert asked <= exported() | KUBE_STATE_METRICS.keys()
    for name, labels in re.findall(r"(kube_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)(?:=|!=|=~)\"", labels)) <= KUBE_STATE_METRICS[name]


def test_every_alert_says_what_to_do_in_the_pages() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    assert len(RULES) >= 7
    for rule in RULES:
        assert f"| `{rule['alert']}` |" in page
        assert rule["labels"]["severity"] in ("warning", "critical")


# Series in promtool's notation, the time, and the alerts that fire then.
CASES: list[tuple[dict[str, str], str, set[str]]] = [
    (
        {'kube_deployment_status_replicas_available{namespace="n",deployment="patchscan-serve"}': "0x60"},
        "10m",
        {"PatchscanNothingServes"},
    ),
    ({'kube_deployment_status_replicas_available{namespace="n",deployment="patchscan-serve"}': "1x60"}, "10m", set()),
    (
        {
            'patchscan_requests_total{namespace="n",code="200"}': "0+90x60",
            'patchscan_requests_total{namespace="n",code="503"}': "0+10x60",
        },
        "40m",
        {"PatchscanServingErrors"},
    ),
    (
        {'kube_job_failed{namespace="n",condition="true",job_name="patchscan-roll-out-29"}': "1x60"},
        "10m",
        {"PatchscanRollOutFailed"},
    ),
    (
        {'kube_job_failed{namespace="n",condition="true",job_name="patchscan-scan-29"}': "1x60"},
        "10m",
        {"PatchscanScanFailed"},
    ),
    ({'kube_job_failed{namespace="n",condition="true",job_name="train-ssp"}': "1x60"}, "10m", set()),
    (
        {'kube_cronjob_status_last_successful_time{namespace="n",cronjob="patchscan-scan"}': "0x4000"},
        "49h",
        {"PatchscanScanMissing"},
    ),
    ({'kube_cronjob_created{namespace="n",cronjob="patchscan-scan"}': "0x4000"}, "49h", {"PatchscanScanMissing"}),
    (
        {
            'kube_cronjob_created{namespace="n",cronjob="patchscan-scan"}': "0x4000",
            'kube_cronjob_status_last_successful_time{namespace="n",cronjob="patchscan-scan"}': "90000x4000",
        },
        "49h",
        set(),
    ),
    ({'patchscan_scan_last_row_timestamp_seconds{namespace="n"}': "60x60"}, "20m", {"PatchscanScanStalled"}),
    ({'patchscan_scan_last_row_timestamp_seconds{namespace="n"}': "0x60"}, "20m", set()),
    (
        {
            'patchscan_scan_objects_total{namespace="n",status="scored"}': "0+90x60",
            'patchscan_scan_objects_total{namespace="n",status="failed"}': "0+10x60",
        },
        "50m",
        {"PatchscanObjectsFailing"},
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": RULE["spec"]["groups"]}))
    tests = []
    for series, at, firing in CASES:
        given = [{"series": name, "values": values} for name, values in series.items()]
        checks: list[dict[str, Any]] = []
        for rule in RULES:
            query = f'count(ALERTS{{alertname="{rule["alert"]}", alertstate="firing"}})'
            expected = [{"labels": "{}", "value": 1}] if rule["alert"] in firing else []
            checks.append({"expr": query, "eval_time": at, "exp_samples": expected})
        tests.append({"interval": "1m", "input_series": given, "promql_expr_test": checks})
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
