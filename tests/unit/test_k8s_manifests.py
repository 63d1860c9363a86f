"""Every manifest and overlay: valid to the letter, complete in its references, restricted in every pod, pinned in every
image. What the Jobs' scripts call exists."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
import typer
import yaml

from patchscan.cli import app
from patchscan.cluster.coordinator import WorkerSettings, worker_job
from patchscan.cluster.settings import PREFIX, SETTINGS, check_settings
from patchscan.serving.gate import Gate, Tokens
from patchscan.serving.server import TorchServe
from tests.scan_kit import card

Body = dict[str, Any]

K8S = Path(__file__).parents[2] / "k8s"
ALONE = sorted(K8S.glob("train-*.yaml"))
OVERLAYS = [K8S, *sorted((K8S / "overlays").iterdir())]
VERSION = "1.36"
# Secrets that an operator makes; the manifests' first lines say how.
SECRETS = {"patchscan-token", "patchscan-s3"}
# What Kubernetes puts into a container of a Job by itself.
GIVEN = {"JOB_COMPLETION_INDEX"}
JOB_SCRIPT = (K8S.parent / "training/job.sh").read_text()
# What training/job.sh reads only where several nodes train together.
MULTINODE = {"NODES", "GPUS", "JOB_NAME", "SERVICE"}


@cache
def rendered(folder: Path) -> list[Body]:
    """What `kubectl kustomize` makes of a folder."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is missing: install it to check the overlays")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def objects(source: Path) -> list[Body]:
    return parsed(source.read_text()) if source.is_file() else rendered(source)


def parsed(text: str) -> list[Body]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


every_source = pytest.mark.parametrize(
    "source", [*ALONE, *OVERLAYS], ids=lambda path: str(path.relative_to(K8S.parent))
)


def script_of(container: Body) -> str:
    """What a container runs: its arguments, or the script that they name."""
    return JOB_SCRIPT if "training/job.sh" in container["args"] else "\n".join(container["args"])


def pod_templates(bodies: list[Body]) -> Iterator[tuple[str, Body]]:
    for body in bodies:
        spec = body.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield f"{body['kind']}/{body['metadata']['name']}", template


def containers(template: Body) -> list[Body]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def names(bodies: list[Body], kind: str) -> set[str]:
    return {body["metadata"]["name"] for body in bodies if body["kind"] == kind}


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options_of(command: str) -> set[str]:
    found = COMMANDS[command]
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}


@every_source
def test_every_object_is_valid_to_the_letter(source: Path) -> None:
    for body in objects(source):
        if "monitoring.coreos.com" not in body["apiVersion"]:
            kubernetes_validate.validate(body, VERSION, strict=True)


def test_the_validator_finds_a_misspelt_field() -> None:
    job = next(body for body in objects(ALONE[0]) if body["kind"] == "Job")
    job["spec"]["backofLimit"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


@every_source
def test_everything_carries_the_label_that_it_is_removed_by(source: Path) -> None:
    for body in objects(source):
        assert body["metadata"]["labels"]["app.kubernetes.io/part-of"] == "patchscan", body["metadata"]["name"]
    for name, template in pod_templates(objects(source)):
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "patchscan", name


@every_source
def test_every_pod_is_restricted(source: Path) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a read-only root."""
    for name, template in pod_templates(objects(source)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        allowed = {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}
        assert all(volume.keys() - {"name"} <= allowed for volume in spec["volumes"]), name
        for container in containers(template):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]), name


@every_source
def test_every_image_is_pinned_and_every_container_has_requests_and_a_memory_limit(source: Path) -> None:
    for name, template in pod_templates(objects(source)):
        for container in containers(template):
            digest = re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"])
            assert digest or re.fullmatch(r"\S+:\d+\.\d+\.\d+", container["image"]), name
            assert digest or "production" not in source.name, f"{name}: production names images by digest"
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name


@every_source
def test_only_who_speaks_to_the_api_server_has_a_token(source: Path) -> None:
    bodies = objects(source)
    with_token = {name for name, one in pod_templates(bodies) if one["spec"].get("automountServiceAccountToken", True)}
    assert with_token <= {"CronJob/patchscan-scan", "CronJob/patchscan-roll-out"}
    for body in bodies:
        if body["kind"] == "ServiceAccount":
            assert body["automountServiceAccountToken"] is False


@every_source
def test_everything_named_is_there(source: Path) -> None:
    bodies = objects(source)
    for name, template in pod_templates(bodies):
        spec = template["spec"]
        assert spec["serviceAccountName"] in names(bodies, "ServiceAccount"), name
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in SECRETS, name
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names(bodies, "PersistentVolumeClaim"), name
        for container in containers(template):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys(), name
            for origin in container.get("envFrom", []):
                if "configMapRef" in origin:
                    assert origin["configMapRef"]["name"] in names(bodies, "ConfigMap"), name
                else:
                    assert origin["secretRef"]["name"] in SECRETS, name
    for body in bodies:
        if body["kind"] == "RoleBinding":
            assert body["roleRef"]["name"] in names(bodies, "Role")
            assert {one["name"] for one in body["subjects"]} <= names(bodies, "ServiceAccount")
        if body["kind"] == "HorizontalPodAutoscaler":
            assert body["spec"]["scaleTargetRef"]["name"] in names(bodies, "Deployment")
        if subdomain := body.get("spec", {}).get("template", {}).get("spec", {}).get("subdomain"):
            assert subdomain in names(bodies, "Service")


@every_source
def test_every_variable_in_a_command_is_set(source: Path) -> None:
    bodies = objects(source)
    maps = {body["metadata"]["name"]: body["data"] for body in bodies if body["kind"] == "ConfigMap"}
    for name, template in pod_templates(bodies):
        for container in containers(template):
            known = {one["name"] for one in container.get("env", [])} | GIVEN
            for origin in container.get("envFrom", []):
                known |= set(maps.get(origin.get("configMapRef", {}).get("name"), {}))
            if not (known & MULTINODE):
                known |= MULTINODE
            # What the script uses only where it is set: ${WEIGHTS:+...}.
            text = re.sub(r"\$\{[A-Z_]+:\+[^}]*\}", "", script_of(container))
            assert set(re.findall(r"\$\(([A-Z_]+)\)|\"\$([A-Z_]+)", text)), name
            used = {one or other for one, other in re.findall(r"\$\(([A-Z_]+)\)|\$([A-Z_]+)", text)}
            assert used <= known, f"{name}: {used - known}"


def test_every_setting_is_used() -> None:
    bodies = rendered(K8S)
    used = " ".join(script_of(container) for _, template in pod_templates(bodies) for container in containers(template))
    (settings,) = [body["data"] for body in bodies if body["kind"] == "ConfigMap"]
    assert {name for name in settings if not re.search(rf"\$\(?{name}\b", used)} == {"AWS_DEFAULT_REGION"}


@every_source
def test_every_name_in_the_settings_is_known(source: Path) -> None:
    bodies = objects(source)
    for body in bodies:
        if body["kind"] == "ConfigMap" and body["metadata"]["name"].startswith("patchscan-settings"):
            assert {name for name in body["data"] if name not in SETTINGS} == {"AWS_DEFAULT_REGION"}
            assert set(SETTINGS) <= body["data"].keys()
            given = {PREFIX + name: value for name, value in body["data"].items()}
            check_settings(given)
    for name, template in pod_templates(bodies):
        if name in ("CronJob/patchscan-scan", "CronJob/patchscan-roll-out"):
            origins = containers(template)[0]["envFrom"]
            own, again = (one for one in origins if "configMapRef" in one)
            assert again == {"prefix": PREFIX} | own


def test_a_setting_reaches_the_option_of_its_name() -> None:
    reached = {}
    for file in sorted((K8S / "base").glob("*.yaml")):
        for name, template in pod_templates(objects(file)):
            given = [
                re.findall(r"^--([a-z-]+)=\$\((\w+)\)$", script_of(one), re.MULTILINE) for one in containers(template)
            ]
            reached[name] = {(option, setting) for found in given for option, setting in found}
    others = {one for found in reached.values() for one in found if one[1] != one[0].replace("-", "_").upper()}
    assert others == {("out", "RESULTS")}
    assert {option for option, _ in reached["CronJob/patchscan-scan"]} == {
        *("out", "model", "queue", "max-objects", "shard-objects", "shard-mb"),
        *("parallelism", "min-parallelism", "worker-cpu", "worker-memory"),
    }


def test_the_kueue_overlay_sets_the_queue() -> None:
    base, kueue = rendered(K8S), rendered(K8S / "overlays/kueue")
    assert [body["data"] | {"QUEUE": "patchscan"} for body in base if body["kind"] == "ConfigMap"] == [
        body["data"] for body in kueue if body["kind"] == "ConfigMap"
    ]


@every_source
def test_every_command_exists_with_its_options(source: Path) -> None:
    for name, template in pod_templates(objects(source)):
        for container in containers(template):
            text = script_of(container).replace("\\\n", " ").replace('"$@" "$recipe"', "patchscan train RECIPE")
            for command, rest in re.findall(r"patchscan ([a-z-]+)([^\n]*?)(?=\n|patchscan [a-z-]+ |$)", text):
                options = {option.partition("=")[0] for option in re.findall(r"(?<= )--[a-z][\w-]*", rest)}
                assert options <= options_of(command), f"{name}: {command} {options - options_of(command)}"


@every_source
def test_selectors_match_and_ports_exist(source: Path) -> None:
    bodies = objects(source)
    pods = list(pod_templates(bodies))
    for body in bodies:
        kind, name, spec = body["kind"], body["metadata"]["name"], body.get("spec", {})
        if kind in ("Deployment", "PodDisruptionBudget", "Service"):
            wanted = spec["selector"] if kind == "Service" else spec["selector"]["matchLabels"]
            chosen = [one for _, one in pods if wanted.items() <= one["metadata"]["labels"].items()]
            assert len(chosen) == 1, f"{kind}/{name} selects {len(chosen)} kinds of pods"
            ports = {port["name"] for container in containers(chosen[0]) for port in container.get("ports", [])}
            assert {port["targetPort"] for port in spec.get("ports", [])} <= ports, name
        if kind == "NetworkPolicy" and "matchLabels" in spec["podSelector"] and source in OVERLAYS[:1]:
            wanted = spec["podSelector"]["matchLabels"]
            train = {"app.kubernetes.io/part-of": "patchscan", "app.kubernetes.io/component": "train"}
            assert any(
                wanted.items() <= labels.items() for labels in [train, *(one["metadata"]["labels"] for _, one in pods)]
            )


@every_source
def test_jobs_survive_eviction_and_give_up_on_wrong_settings(source: Path) -> None:
    for body in objects(source):
        spec = body["spec"]["jobTemplate"]["spec"] if body["kind"] == "CronJob" else body.get("spec", {})
        if body["kind"] in ("Job", "CronJob"):
            rules = spec["podFailurePolicy"]["rules"]
            assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
            fatal = rules[1]["onExitCodes"]
            assert rules[1]["action"] == "FailJob"
            assert 2 in fatal["values"]
            assert 75 not in fatal["values"]
            assert fatal["containerName"] in {one["name"] for one in containers(spec["template"])}
            assert spec["template"]["spec"]["restartPolicy"] == "Never"
            assert spec["activeDeadlineSeconds"] > 0
            # The CronJobs keep a few of theirs; another Job goes by itself.
            assert body["kind"] == "CronJob" or spec["ttlSecondsAfterFinished"] > 0


def test_default_deny_and_rights_are_narrow() -> None:
    bodies = rendered(K8S)
    deny = next(body for body in bodies if body["metadata"]["name"] == "patchscan-default-deny")
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & deny["spec"].keys()
    rights = {
        body["metadata"]["name"]: {
            (resource, verb) for rule in body["rules"] for resource in rule["resources"] for verb in rule["verbs"]
        }
        for body in bodies
        if body["kind"] == "Role"
    }
    jobs = {("jobs", verb) for verb in ("create", "get", "list", "watch", "patch", "delete")}
    events = {("events", verb) for verb in ("create", "get", "list", "patch")}
    assert rights["patchscan-scan"] == jobs | events | {("pods", "list")}
    assert rights["patchscan-roll-out"] == events | {
        ("deployments", "get"),
        ("deployments", "patch"),
        ("jobs", "list"),
        ("pods", "list"),
    }
    assert not names(bodies, "ClusterRole")
    exposed = {port["port"] for body in bodies if body["kind"] == "Service" for port in body["spec"]["ports"]}
    assert 8081 not in exposed, "the management API stays inside the pod"


def test_why_a_serving_pod_failed_is_in_its_status() -> None:
    """The roll-out quotes it: the pod and its log are gone when somebody looks."""
    deployment = next(body for body in rendered(K8S) if body["kind"] == "Deployment")
    for container in containers(deployment["spec"]["template"]):
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", container["name"]


def test_a_roll_out_does_not_begin_with_the_scan_of_events() -> None:
    """It waits for scans that run, and would find that one every time."""
    jobs = {body["metadata"]["name"]: body["spec"] for body in rendered(K8S) if body["kind"] == "CronJob"}
    minutes = {name: jobs[f"patchscan-{name}"]["schedule"].split()[0] for name in ("events", "roll-out")}
    assert minutes == {"events": "*/5", "roll-out": "2-59/5"}


def test_roll_outs_never_go_below_capacity() -> None:
    deployment = next(body for body in rendered(K8S) if body["kind"] == "Deployment")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in deployment["spec"], "the autoscaler owns them"


def test_probes_and_autoscaler_ask_for_what_the_gate_answers_without_a_token() -> None:
    gate = Gate(cast(TorchServe, None), Tokens(Path("none")))
    bodies = rendered(K8S)
    (serve,) = next(body for body in bodies if body["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"]
    asked = {serve[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"/readyz", "/livez"}
    assert {serve[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe")} == {"inference"}
    (metric,) = next(body for body in bodies if body["kind"] == "HorizontalPodAutoscaler")["spec"]["metrics"]
    exported = {family.name for family in gate._registry.collect()}
    assert metric["pods"]["metric"]["name"] in exported


def test_the_cpu_overlay_asks_for_no_gpu() -> None:
    (job,) = [body for body in rendered(K8S / "overlays/train-cpu") if body["kind"] == "Job"]
    assert "gpu" not in yaml.dump(job)


def test_training_files_differ_from_ssp_in_recipe_only() -> None:
    """The three stay one manifest, each whole in its own file."""
    ssp = (K8S / "train-ssp.yaml").read_text().partition("apiVersion")[2]
    other = (K8S / "train-resnet50.yaml").read_text().partition("apiVersion")[2]
    assert other.replace("resnet50", "ssp").replace('"10"', '"30"').replace("ssp.pth", "resnet50.pth") == ssp


def test_the_workers_job_is_valid_and_runs_what_exists(tmp_path: Path) -> None:
    from patchscan.cluster.client import Job
    from patchscan.scanning.plan import ScanSource
    from patchscan.scanning.planning import ScanRequest, plan_scan
    from patchscan.storage import open_store

    (tmp_path / "in").mkdir()
    made = plan_scan(
        ScanRequest(source=ScanSource(url=str(tmp_path / "in")), card=card()), open_store(str(tmp_path / "out"))
    )
    template = next(one for name, one in pod_templates(objects(K8S)) if name == "CronJob/patchscan-scan")
    coordinator = Job("own", "uid-1", "1", {}, {}, 1, 0, 0, [], None, "", "", template)
    workers = WorkerSettings(command=["patchscan", "scan-worker", "--select", "worker"], queue="patchscan")
    body = worker_job(made, "s3://out/scans/x/plan.json", [0, 1, 5], 1, workers, coordinator)
    kubernetes_validate.validate(body, VERSION, strict=True)
    assert body["spec"]["suspend"] is True
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "patchscan"
    assert len(body["metadata"]["name"]) + len("-99999-abcde") <= 63
    arguments = body["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[-4:] == ["--within", "0-1,5", "--index", "$(JOB_COMPLETION_INDEX)"]
    assert {one for one in arguments if one.startswith("--")} <= options_of("scan-worker")
