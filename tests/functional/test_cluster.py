"""Scans by an Indexed Job, on an API server over HTTP whose pods work real shards; and what a laptop submits."""

import base64
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from patchscan.cli import app
from patchscan.cluster import coordinator
from patchscan.cluster.api_server import ClusterError
from patchscan.cluster.client import Cluster, Job, JobGoneError
from patchscan.cluster.coordinator import ConfigurationError, ShardsFailedError, WorkerSettings
from patchscan.cluster.elastic import next_parallelism
from patchscan.cluster.status import job_statuses
from patchscan.cluster.submitting import log_lines, parse_settings, submit_from_cron_job, submit_manifest
from patchscan.common import retries
from patchscan.common.errors import UserError
from patchscan.common.retries import OutageError
from patchscan.dataset.labels import LabelError
from patchscan.scanning import options, report
from patchscan.scanning.alerts import WebhookError
from patchscan.scanning.history import PLANNING_FILE, last_complete
from patchscan.scanning.plan import Plan, ScanSource, is_complete, parse_plan_url
from patchscan.scanning.planning import ScanRequest, plan_scan
from patchscan.scanning.shards import parse_ranges
from patchscan.scanning.worker import Worker, WorkSettings
from patchscan.storage import open_store
from patchscan.storage.folder import Folder
from patchscan.storage.store import Store
from tests.c2pa_kit import CAPTURED, identity, sign
from tests.kube_api import OOM_KILLED, KubeApi, container_status, job_pod, unschedulable
from tests.kube_objects import Body
from tests.scan_kit import StubScorer, image, table_of

K8S = Path(__file__).parents[2] / "k8s"
PART_OF = {"app.kubernetes.io/part-of": "patchscan"}
TRAINING = {"metadata": {"name": "train", "labels": PART_OF}, "spec": {"template": {}}}
WORKERS = WorkerSettings(command=["patchscan", "scan-worker"], parallelism=3, retries=2)


class Bench:
    """A planned scan of twelve images in six shards, a cluster whose pods work them, and what goes wrong there."""

    def __init__(self, folder: Path):
        photos = folder / "photos"
        photos.mkdir()
        for number in range(12):
            (photos / f"{number}.png").write_bytes(image(number))
        self.scorer = StubScorer()
        self.out: Store = open_store(str(folder / "out"))
        self.plan = plan_scan(
            ScanRequest(source=ScanSource(url=str(photos)), card=self.scorer.card, shard_objects=2),
            self.out,
        )
        self.trouble: Callable[[int, int], tuple[int, str]] = lambda shard, attempt: (0, "")
        self.tries: list[int] = []
        self.api = KubeApi(self.pod)

    def pod(self, job: Body, index: int, attempt: int) -> tuple[int, str]:
        """What a worker pod does with its command line, JOB_COMPLETION_INDEX put in as a kubelet would."""
        arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
        options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert options["--index"] == "$(JOB_COMPLETION_INDEX)"
        shard = parse_ranges(options["--within"])[index]
        self.tries.append(shard)
        code, words = self.trouble(shard, attempt)
        if code == 0:
            plan = Plan.read(self.out, parse_plan_url(options["--plan"])[1])
            Worker(plan, self.out, self.scorer, WorkSettings(threads=2)).work(shard)
        return code, words

    def cluster(self, patience_s: float = 5.0) -> Cluster:
        return Cluster(self.api.client(), "default", patience_s=patience_s, pause_s=0.01)

    def work(self) -> None:
        cluster = self.cluster()
        own = cluster.job("coordinator") or cluster.create_job(coordinator_job())
        coordinator.work_shards(cluster, self.plan, self.out, WORKERS, own)

    def worker_jobs(self) -> list[Body]:
        return [job for job in self.api.all("jobs") if job["metadata"]["name"] != "coordinator"]


def coordinator_job() -> Body:
    """The Job that the CronJob of k8s/base makes."""
    cron_job = next(one for one in yaml.safe_load_all((K8S / "base/scan.yaml").read_text()) if one["kind"] == "CronJob")
    template = cron_job["spec"]["jobTemplate"]
    return {"kind": "Job", "metadata": template["metadata"] | {"name": "coordinator"}, "spec": template["spec"]}


def put_cron_job(bench: Bench) -> None:
    """The CronJob of k8s/base, as `kubectl apply` creates it."""
    documents = yaml.safe_load_all((K8S / "base/scan.yaml").read_text())
    bench.api.put("cronjobs", next(one for one in documents if one["kind"] == "CronJob"))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    with made.api:
        yield made


def test_a_job_of_pods_gives_the_rows_of_one_process(bench: Bench) -> None:
    bench.work()
    report.reduce(bench.out, bench.plan)
    assert is_complete(bench.out, bench.plan.scan)
    assert len(table_of(bench.out, bench.plan.scan)) == 12
    assert sorted(bench.tries) == list(range(6))
    coordinator.clean_up(bench.cluster(), bench.plan)
    assert bench.worker_jobs() == []
    assert bench.api.all("pods") == []


def test_expired_and_broken_watches_and_a_busy_server_are_ridden_out(bench: Bench) -> None:
    bench.trouble = slow
    bench.api.expire_watches, bench.api.drop_watches, bench.api.cut_watches = 1, 2, 1
    bench.api.faults = [("GET", "/jobs", 503), ("POST", "/jobs", 500), ("GET", "watch", 429), ("GET", "watch", 410)]
    bench.work()
    assert coordinator.unfinished_shards(bench.out, bench.plan) == []
    assert bench.api.expire_watches == bench.api.drop_watches == bench.api.cut_watches == 0
    assert bench.api.faults == []
    assert len(bench.worker_jobs()) == 1


def test_a_coordinator_that_comes_later_finds_the_running_job(bench: Bench) -> None:
    bench.cluster().create_job(coordinator_job())
    go_on = threading.Event()
    bench.trouble = lambda shard, attempt: (go_on.wait(20), (0, ""))[1]
    crew = [threading.Thread(target=bench.work) for _ in range(3)]
    for thread in crew:
        thread.start()
        time.sleep(0.2)
    go_on.set()
    for thread in crew:
        thread.join(30)
    assert len(bench.worker_jobs()) == 1
    assert sorted(bench.tries) == list(range(6))


def test_a_job_created_by_a_faster_coordinator_is_followed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen no Job; who comes second gets 409 and takes the first one's."""
    go_on = threading.Event()
    bench.trouble = lambda shard, attempt: (go_on.wait(20), (0, ""))[1]
    first = threading.Thread(target=bench.work)
    first.start()
    while not bench.worker_jobs():
        time.sleep(0.01)
    stale = bench.cluster()
    seen: list[list[Job]] = [[], []]
    monkeypatch.setattr(stale, "jobs", lambda selector: seen.pop() if seen else Cluster.jobs(stale, selector))
    own = stale.job("coordinator")
    assert own
    threading.Timer(0.3, go_on.set).start()
    coordinator.work_shards(stale, bench.plan, bench.out, WORKERS, own)
    first.join(30)
    assert seen == []
    assert len(bench.worker_jobs()) == 1


def test_failed_shards_are_named_and_a_rerun_works_only_them(bench: Bench) -> None:
    bench.trouble = lambda shard, attempt: (75, "the server: ReadTimeout") if shard in (1, 4) else (0, "")
    with pytest.raises(
        ShardsFailedError, match=r"shards 1,4 missing: shard 1: exit code 75, the server: ReadTimeout"
    ) as failed:
        bench.work()
    assert "FailedIndexes" in str(failed.value)
    assert bench.tries.count(1) == bench.tries.count(4) == WORKERS.retries + 1
    bench.trouble, bench.tries = (lambda shard, attempt: (0, "")), []
    bench.work()
    assert bench.tries == [1, 4]
    names = [job["metadata"]["name"] for job in bench.worker_jobs()]
    assert [name.rpartition("-")[2] for name in names] == ["1", "2"]
    report.reduce(bench.out, bench.plan)


def test_a_wrong_setting_is_tried_once_and_is_no_interruption(bench: Bench) -> None:
    bench.trouble = lambda shard, attempt: (2, "patchscan: http://patchscan-serve:8080 refuses the token")
    with pytest.raises(ConfigurationError, match="refuses the token"):
        bench.work()
    assert bench.tries == list(range(6))


def test_a_job_deleted_under_way_is_an_interruption(bench: Bench) -> None:
    def delete(shard: int, attempt: int) -> tuple[int, str]:
        bench.api.delete("jobs", bench.worker_jobs()[0]["metadata"]["name"])
        return 0, ""

    bench.trouble = delete
    with pytest.raises(ShardsFailedError, match="was deleted"):
        bench.work()
    bench.trouble = lambda shard, attempt: (0, "")
    bench.work()
    assert coordinator.unfinished_shards(bench.out, bench.plan) == []


def test_a_job_deleted_while_its_pods_are_counted_is_an_interruption_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchscan.cluster.elastic.ADJUST_S", 0.0)
    cluster = bench.cluster()
    own = cluster.create_job(coordinator_job())

    def delete() -> bool:
        bench.api.delete("jobs", bench.worker_jobs()[0]["metadata"]["name"])
        return True

    def slowly(shard: int, attempt: int) -> tuple[int, str]:
        time.sleep(0.5)
        return 0, ""

    bench.trouble = slowly
    with pytest.raises(ShardsFailedError, match="was deleted"):
        coordinator.work_shards(cluster, bench.plan, bench.out, replace(WORKERS, least=1, parallelism=3), own, delete)


def test_workers_are_the_coordinators_pod_without_its_rights(bench: Bench) -> None:
    bench.work()
    (job,) = bench.worker_jobs()
    pod, own = job["spec"]["template"]["spec"], coordinator_job()["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"] == own["securityContext"]
    assert pod["containers"][0]["securityContext"] == own["containers"][0]["securityContext"]
    assert pod["containers"][0]["image"] == own["containers"][0]["image"]
    assert pod["volumes"] == own["volumes"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == bench.api.get("jobs", "coordinator")["metadata"]["uid"]  # type: ignore[index]
    bench.api.delete("jobs", "coordinator")
    assert bench.worker_jobs() == []


def test_a_cluster_that_does_not_answer_is_an_outage(bench: Bench) -> None:
    bench.api.faults = [("GET", "/jobs", 503)] * 50
    with pytest.raises(OutageError, match="does not answer"):
        bench.cluster(patience_s=0.3).job("any")


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize(("method", "status"), [("GET", 429), ("GET", 503), ("PATCH", 409)])
def test_a_busy_server_is_asked_again_at_our_own_pace(bench: Bench, method: str, status: int) -> None:
    """It says Retry-After: 15 (seconds), which the HTTP library would wait without a word; or that somebody else was
    faster to change the object."""
    cluster = Cluster.connect()
    cluster.create_job(coordinator_job())
    bench.api.faults = [(method, "/jobs/coordinator", status)]
    started = time.monotonic()
    cluster.patch_job("coordinator", {"spec": {"parallelism": 2}})
    found = cluster.job("coordinator")
    assert found
    assert found.parallelism == 2
    assert bench.api.faults == []
    assert time.monotonic() - started < 10


def test_refusals_carry_the_servers_words(bench: Bench) -> None:
    bench.api.faults = [("GET", "/jobs", 403)]
    with pytest.raises(ClusterError, match=r"refuses \(403\): scripted fault"):
        bench.cluster().jobs()
    with pytest.raises(JobGoneError):
        list(bench.cluster().follow("none"))


def test_listing_reads_every_page(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.cluster.client.PAGE", 2)
    bench.work()
    name = bench.worker_jobs()[0]["metadata"]["name"]
    bench.api.expire_lists = 2
    names = [pod["metadata"]["name"] for pod in bench.cluster().pods(name)]
    assert len(names) == len(set(names)) == 6
    assert bench.api.expire_lists == 0
    bench.api.expire_lists = 99
    with pytest.raises(OutageError, match="forgets a list of pods"):
        bench.cluster().pods(name)


def slow(shard: int, attempt: int) -> tuple[int, str]:
    """A pod that takes a moment."""
    time.sleep(0.3)
    return 0, ""


def test_every_failed_pod_is_a_line_and_shards_given_up_are_an_event(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.trouble = lambda shard, attempt: (75, f"{{}}\npatchscan: try {attempt}") if shard == 4 else (0, "")
    with pytest.raises(ShardsFailedError):
        bench.work()
    told = [line for line in capsys.readouterr().err.splitlines() if " failed on shard 4: exit code 75" in line]
    assert [line.rpartition(" ")[2] for line in told] == ["0", "1", "2"]
    events = {event["reason"]: event for event in bench.api.all("events")}
    assert "6 of 6 shards to do" in events["Planned"]["message"]
    assert events["ShardsGivenUp"]["type"] == "Warning"
    assert "shard 4: exit code 75, patchscan: try 2" in events["ShardsGivenUp"]["message"]
    own: Any = bench.api.get("jobs", "coordinator")
    assert {event["involvedObject"]["uid"] for event in events.values()} == {own["metadata"]["uid"]}


def test_a_quiet_job_is_told_with_what_it_waits_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("patchscan.cluster.client.WATCH_S", 1)
    monkeypatch.setattr(coordinator, "QUIET_S", 0.5)

    def wait(shard: int, attempt: int) -> tuple[int, str]:
        if shard == 0:
            pod = job_pod(bench.worker_jobs()[0], 1, 0)
            bench.api.put("pods", pod | {"status": unschedulable("0/1 nodes are available: 1 Insufficient cpu.")})
            time.sleep(3)
        return 0, ""

    bench.trouble = wait
    bench.work()
    told = capsys.readouterr().err
    assert "1 pod waits: no node takes it: 0/1 nodes are available: 1 Insufficient cpu." in told


@pytest.mark.parametrize(
    ("code", "words", "remedy"),
    [
        (OOM_KILLED, "", r"killed for memory \(OOMKilled\), its limit is 1Gi; so at every try: raise WORKER_MEMORY"),
        (70, "ValueError: a bug", "ValueError: a bug; so at every try, trying again cannot help"),
    ],
)
def test_a_cause_that_cannot_heal_ends_the_scan_with_its_name(bench: Bench, code: int, words: str, remedy: str) -> None:
    bench.trouble = lambda shard, attempt: (code, words) if shard == 2 else (0, "")
    with pytest.raises(ConfigurationError, match=f"shards 2 missing: shard 2: .*{remedy}"):
        bench.work()
    assert bench.tries.count(2) == WORKERS.retries + 1


def test_a_disk_limit_that_is_too_small_for_ever_ends_the_scan(bench: Bench) -> None:
    bench.trouble = lambda shard, attempt: (1, "") if shard == 2 else (0, "")
    put = bench.api.put

    def evict(kind: str, body: Body) -> Body:
        if kind == "pods" and body["status"]["phase"] == "Failed":
            message = 'Usage of EmptyDir volume "scratch" exceeds the limit "10Gi". '
            body["status"] |= {"reason": "Evicted", "message": message}
        return put(kind, body)

    bench.api.put = evict  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match=r'exceeds the limit "10Gi"\..*: raise that limit in the CronJob'):
        bench.work()


@pytest.mark.parametrize(
    ("cpu", "memory", "words"),
    [
        ("1", "512m", "WORKER_MEMORY 512m is too little for a worker; write it as 1Gi"),
        ("1", "1", "WORKER_MEMORY 1 is too little"),
        ("1", "1GiB", "WORKER_MEMORY '1GiB' is no quantity; write it as 1Gi"),
        ("1", "", "WORKER_MEMORY '' is no quantity"),
        ("0", "1Gi", "WORKER_CPU 0 is too little"),
        ("one", "1Gi", "WORKER_CPU 'one' is no quantity; write it as 500m"),
    ],
)
def test_amounts_that_no_worker_can_run_with_start_none(cpu: str, memory: str, words: str) -> None:
    coordinator.check_amounts("500m", "64Mi")
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        coordinator.check_amounts(cpu, memory)


def test_memory_that_was_enough_at_one_try_is_no_cause_that_cannot_heal(bench: Bench) -> None:
    bench.trouble = lambda shard, attempt: (OOM_KILLED if attempt else 75, "") if shard == 2 else (0, "")
    with pytest.raises(ShardsFailedError, match="a rerun works on these only"):
        bench.work()


def test_a_pod_that_the_cluster_ended_is_no_try_of_its_shard(bench: Bench) -> None:
    """Each index was killed for memory at every try that counts; one of its pods was evicted, which does not count."""
    bench.trouble = lambda shard, attempt: (OOM_KILLED if attempt else 75, "") if shard == 2 else (0, "")
    put = bench.api.put

    def evict(kind: str, body: Body) -> Body:
        if kind == "pods" and body["metadata"]["name"].endswith("-2-0") and body["status"]["phase"] == "Failed":
            disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
            body["status"]["conditions"] = [disrupted]
        return put(kind, body)

    bench.api.put = evict  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="so at every try: raise WORKER_MEMORY"):
        bench.work()


def test_the_number_of_pods_follows_what_the_server_can_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server answers 503 to the third question."""
    monkeypatch.setattr("patchscan.cluster.elastic.ADJUST_S", 0.0)
    answers = iter([True, True, False])
    at_once: list[int] = []

    def watch(shard: int, attempt: int) -> tuple[int, str]:
        time.sleep(0.5)
        at_once.append(bench.worker_jobs()[0]["spec"]["parallelism"])
        return 0, ""

    bench.trouble = watch
    cluster = bench.cluster()
    own = cluster.create_job(coordinator_job())
    settings = replace(WORKERS, least=1, parallelism=3)
    coordinator.work_shards(cluster, bench.plan, bench.out, settings, own, lambda: next(answers, True))
    told = [line for line in capsys.readouterr().err.splitlines() if "pods at once" in line]
    assert [re.search(r"up to (\d)", line)[1] for line in told][:4] == ["2", "3", "1", "2"]  # type: ignore[index]
    assert "before 3: the server is overloaded" in told[2]
    assert max(at_once) <= 3


def test_parallelism_stays_between_its_bounds() -> None:
    assert [next_parallelism(current, 2, 7, True) for current in (2, 4, 6, 7, 9)] == [4, 6, 7, 7, 7]
    assert [next_parallelism(current, 2, 7, False) for current in (2, 7)] == [2, 2]


def test_a_job_without_bounds_keeps_its_number_of_pods(bench: Bench) -> None:
    bench.work()
    assert bench.worker_jobs()[0]["spec"]["parallelism"] == WORKERS.parallelism
    assert not any(request.startswith("PATCH") and "/jobs/" in request for request in bench.api.requests)


def test_submit_train_creates_what_the_manifest_says_with_other_settings(bench: Bench) -> None:
    cluster, path = bench.cluster(), str(K8S / "train-ssp-multinode.yaml")
    assert submit_manifest(cluster, path, None, {"EPOCHS": "3"}) == "train-ssp-multinode"
    environment = bench.api.get("jobs", "train-ssp-multinode")["spec"]["template"]["spec"]["containers"][0]["env"]  # type: ignore[index]
    assert [one["value"] for one in environment if one["name"] == "EPOCHS"] == ["3"]
    assert bench.api.get("services", "train-ssp-multinode")
    with pytest.raises(ClusterError, match="there is a Job train-ssp-multinode already"):
        submit_manifest(cluster, path, None, {})
    assert submit_manifest(cluster, path, "second", {}) == "second"
    with pytest.raises(ClusterError, match="--set EPOCH: there is no such setting; did you mean EPOCHS"):
        submit_manifest(cluster, path, "third", {"EPOCH": "3"})
    with pytest.raises(
        ClusterError, match="--set NODES: change it in the manifest, together with completions and para"
    ):
        submit_manifest(cluster, path, "third", {"NODES": "4"})
    assert bench.api.get("jobs", "third") is None


def test_submit_train_does_not_take_the_service_of_others(bench: Bench) -> None:
    others = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "train-ssp-multinode"}}
    bench.cluster().create(others | {"spec": {"selector": {"app": "shop"}, "ports": [{"port": 80}]}})
    with pytest.raises(ClusterError, match="there is another Service train-ssp-multinode already"):
        submit_manifest(bench.cluster(), str(K8S / "train-ssp-multinode.yaml"), None, {})
    assert bench.api.all("jobs") == []


JOB = "kind: Job\nmetadata: {name: x}\nspec: {template: {spec: {containers: []}}}\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"# Read me\n", "contains 0 Jobs"),
        (b"a sentence\n---\n- a list\n", "contains 0 Jobs"),
        (b"\xff\xfe", "cannot be read"),
        (b"a: 2026-99-99", "cannot be read"),
        (b"kind: Job", "lacks metadata.name or spec.template.spec"),
        (b"kind: Job\nmetadata: x\nspec: []", "lacks metadata.name or spec.template.spec"),
        (b"kind: Job\nmetadata: {name: x}\nspec: {template: {spec: a text}}", "another form than Kubernetes"),
        (b"kind: Job\nmetadata: {name: x}\nspec: {template: {spec: {containers: 3}}}", "another form than Kubernetes"),
        (JOB.replace("containers: []", "").encode(), "there is no such setting"),
        (f"{JOB}---\nmetadata: {{}}\n".encode(), "patchscan creates no None"),
    ],
)
def test_a_file_that_is_no_manifest_is_told_in_one_line(bench: Bench, tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "file.yaml").write_bytes(text)
    settings = {"EPOCHS": "3"} if "setting" in why or "form" in why else {}
    with pytest.raises(ClusterError, match=why):
        submit_manifest(bench.cluster(), str(tmp_path / "file.yaml"), None, settings)
    assert bench.api.all("jobs") == []


def test_submit_scan_is_the_nightly_scan_with_another_source(bench: Bench) -> None:
    with pytest.raises(ClusterError, match="no CronJob patchscan-scan"):
        submit_from_cron_job(bench.cluster(), "patchscan-scan", {})
    put_cron_job(bench)
    name = submit_from_cron_job(bench.cluster(), "patchscan-scan", {"SOURCE": "s3://other"})
    job: Any = bench.api.get("jobs", name)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "SOURCE", "value": "s3://other"} in container["env"]
    assert "$(SOURCE)" in container["args"]
    assert any(one["name"] == "JOB_NAME" for one in container["env"])


def test_submit_scan_shortens_a_name_that_a_job_has_no_room_for(bench: Bench) -> None:
    put_cron_job(bench)
    (cron_job,) = bench.api.all("cronjobs")
    for length in (36, 48, 49, 52):
        name = f"{'a' * (length - 5)}-scan"
        bench.api.put("cronjobs", cron_job | {"metadata": cron_job["metadata"] | {"name": name}})
        submitted = submit_from_cron_job(bench.cluster(), name, {})
        assert re.fullmatch(r"a+(-scan|-sca|)-\d{14}", submitted)
        assert len(submitted) <= 63


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("WORKER_MEMRY", "did you mean WORKER_MEMORY"),
        ("worker_memory", "did you mean WORKER_MEMORY"),
        ("NIGHT", "there are .*PARALLELISM"),
        ("JOB_NAME", "there are "),
    ],
)
def test_a_misspelt_setting_starts_no_scan(bench: Bench, wrong: str, hint: str) -> None:
    put_cron_job(bench)
    with pytest.raises(ClusterError, match=f"--set {wrong}: there is no such setting; {hint}"):
        submit_from_cron_job(bench.cluster(), "patchscan-scan", {"PARALLELISM": "2", wrong: "1"})
    assert bench.api.all("jobs") == []


@pytest.mark.parametrize("right", ["WORKER_MEMORY", "MODEL", "AWS_ENDPOINT_URL"])
def test_settings_of_the_arguments_and_the_s3_client_are_known(bench: Bench, right: str) -> None:
    put_cron_job(bench)
    name = submit_from_cron_job(bench.cluster(), "patchscan-scan", {right: "1"})
    environment = bench.api.get("jobs", name)["spec"]["template"]["spec"]["containers"][0]["env"]  # type: ignore[index]
    assert {"name": right, "value": "1"} in environment


def test_a_setting_that_the_scan_does_not_read_starts_none(bench: Bench) -> None:
    put_cron_job(bench)
    bench.api.put("configmaps", {"metadata": {"name": "patchscan-settings"}, "data": {"EVENTS_FROM": ""}})
    with pytest.raises(ClusterError, match="--set EVENTS_FROM: this Job does not read it"):
        submit_from_cron_job(bench.cluster(), "patchscan-scan", {"EVENTS_FROM": "https://sqs.example.com/1/photos"})
    assert bench.api.all("jobs") == []


def test_a_dollar_in_a_setting_stays_one(bench: Bench) -> None:
    """Kubernetes reads `$(NAME)` in variables and arguments as a variable, and `$$` as one `$`."""
    put_cron_job(bench)
    name = submit_from_cron_job(bench.cluster(), "patchscan-scan", {"SOURCE": "s3://photos/a$$b/$(MODEL)"})
    job = bench.cluster().job(name)
    assert job
    (source,) = [one for one in job.template["spec"]["containers"][0]["env"] if one["name"] == "SOURCE"]
    assert source["value"] == "s3://photos/a$$$$b/$$(MODEL)"
    (status,) = job_statuses(bench.cluster())
    assert status.source == "s3://photos/a$$b/$(MODEL)"
    body = coordinator.worker_job(bench.plan, "s3://out/a$$b/plan.json", [0], 1, WORKERS, job)
    arguments = body["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "s3://out/a$$$$b/plan.json" in arguments
    assert arguments[-1] == "$(JOB_COMPLETION_INDEX)"


def test_a_setting_given_twice_starts_none() -> None:
    with pytest.raises(ClusterError, match="--set MODEL: it is given twice"):
        parse_settings(["MODEL=a", "MODEL=b"])


def test_submitted_scans_are_removed_as_the_nights_are(bench: Bench) -> None:
    put_cron_job(bench)
    jobs = []
    for number in range(5):
        job: Any = bench.api.get("jobs", submit_from_cron_job(bench.cluster(), "patchscan-scan", {}))
        bench.api.delete("jobs", job["metadata"]["name"])  # two of one second would have one name
        ended = {"conditions": [{"type": "Complete", "status": "True"}]}
        metadata = job["metadata"] | {"name": f"scan-{number}", "uid": f"uid-{number}"}
        jobs.append(bench.api.put("jobs", job | {"metadata": metadata, "status": ended}))
    bench.api.keep_history()
    assert [job["metadata"]["name"] for job in bench.api.all("jobs")] == ["scan-2", "scan-3", "scan-4"]
    bench.api.delete("cronjobs", "patchscan-scan")
    assert bench.api.all("jobs") == []


def test_a_lost_reply_says_nothing_wrong_of_what_was_done(bench: Bench) -> None:
    cluster = bench.cluster()
    put_cron_job(bench)
    bench.api.lost_replies = [("POST", "/jobs"), ("POST", "/jobs")]
    trained = submit_manifest(cluster, str(K8S / "train/train-ssp.yaml"), None, {})
    scan = submit_from_cron_job(cluster, "patchscan-scan", {})
    assert sorted(job.name for job in cluster.jobs("")) == [scan, trained]
    bench.api.faults = [("POST", "/jobs", 503)]
    with pytest.raises(ClusterError, match="there is a Job train-ssp already"):
        submit_manifest(cluster, str(K8S / "train/train-ssp.yaml"), None, {})
    bench.api.lost_replies = [("DELETE", "/jobs")]
    assert cluster.delete_job(trained)
    assert not cluster.delete_job(trained)


def test_logs_and_cancelling(bench: Bench) -> None:
    bench.trouble = lambda shard, attempt: (0, f"shard {shard} says\nthis")
    bench.work()
    name = bench.worker_jobs()[0]["metadata"]["name"]
    bench.api.faults = [("GET", "/log", 503)]  # asked for again
    assert list(log_lines(bench.cluster(), name, 3, follow=True)) == ["== worker", "shard 3 says", "this"]
    assert bench.api.faults == []
    for follow in (False, True):
        with pytest.raises(ClusterError, match="no pod of index 9: its indexes are 0 to 5"):
            list(log_lines(bench.cluster(), name, 9, follow))
    bench.api.delete("pods", f"{name}-3-0")
    with pytest.raises(
        ClusterError, match=r"has ended \(Complete: CompletionsReached\), and has no pod of index 3 any more"
    ):
        list(log_lines(bench.cluster(), name, 3, follow=True))
    job = bench.api.get("jobs", name)
    assert job
    failed = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "it took too long"}
    bench.api.put("jobs", job | {"status": {"conditions": [failed]}})
    for pod in bench.api.all("pods"):
        bench.api.delete("pods", pod["metadata"]["name"])
    with pytest.raises(ClusterError, match=r"has ended \(Failed: it took too long\), and has no pod any more"):
        list(log_lines(bench.cluster(), name, None, follow=False))
    with pytest.raises(ClusterError, match="there is no Job other"):
        list(log_lines(bench.cluster(), "other", None, follow=True))
    assert bench.cluster().delete_job(name)
    assert not bench.cluster().delete_job(name)


@pytest.mark.usefixtures("kubeconfig")
def test_a_name_that_no_job_can_have_is_that_of_no_other_object(bench: Bench) -> None:
    """An empty name, as of a variable that is not set, made the address of all Jobs: all were deleted."""
    for name in ("", " ", "..", "scan/status", "scan?limit=1", "Scan"):
        for command in (["jobs", "cancel", name], ["jobs", "logs", name], ["submit", "scan", "--cron-job", name]):
            result = CliRunner().invoke(app, command)
            assert isinstance(result.exception, ClusterError), result.output
            assert f"{name!r} is no name of a" in str(result.exception)
        result = CliRunner().invoke(app, ["jobs", "cancel", "scan", "--namespace", name])
        assert f"{name!r} is no name of a namespace" in str(result.exception)
    assert bench.api.requests == []


@pytest.mark.usefixtures("kubeconfig")
def test_a_job_of_the_same_name_that_is_not_patchscans_is_left_alone(bench: Bench) -> None:
    """`jobs status` does not list it, so a name that was copied from there is not meant."""
    for labels in ({}, {"app.kubernetes.io/part-of": "payroll"}):
        bench.api.put("jobs", TRAINING | {"metadata": {"name": "train-ssp", "labels": labels}})
        for command in ("cancel", "logs"):
            result = CliRunner().invoke(app, ["jobs", command, "train-ssp"])
            assert isinstance(result.exception, ClusterError), result.output
            assert str(result.exception).startswith("the Job train-ssp is not patchscan's, it lacks the label app.kube")
        with pytest.raises(ClusterError, match=r"there is a Job train-ssp already: give --name$"):
            submit_manifest(bench.cluster(), str(K8S / "train-ssp.yaml"), None, {})
    assert [job["metadata"]["name"] for job in bench.api.all("jobs")] == ["train-ssp"]


def test_a_job_of_ones_own_manifest_is_listed_and_can_be_cancelled(
    bench: Bench, tmp_path: Path, kubeconfig: None
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "{kind: Job, metadata: {name: mine}, spec: {template: {spec: {containers: [{name: train, image: x}]}}}}"
    )
    submit_manifest(bench.cluster(), str(tmp_path / "mine.yaml"), None, {})
    assert [(one.job, one.kind) for one in job_statuses(bench.cluster())] == [("mine", "training")]
    assert CliRunner().invoke(app, ["jobs", "cancel", "mine"]).exit_code == 0
    assert bench.api.all("jobs") == []


def test_logs_of_a_queued_index_wait_and_say_for_what(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.cluster.submitting.POLL_S", 0.02)
    go_on = threading.Event()
    bench.trouble = lambda shard, attempt: (go_on.wait(120), (0, f"shard {shard} says this"))[1]
    working = threading.Thread(target=bench.work)
    working.start()
    while not bench.api.all("pods"):
        time.sleep(0.01)
    name = bench.worker_jobs()[0]["metadata"]["name"]
    with pytest.raises(ClusterError, match=r"no pod of index 5 yet: .*--follow waits for it"):
        list(log_lines(bench.cluster(), name, 5, follow=False))
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        go_on.set()

    assert list(log_lines(bench.cluster(), name, 5, True, tell)) == ["== worker", "shard 5 says this"]
    working.join(30)
    assert told[0].startswith("waiting for a pod of index 5: ")
    assert "of at most 3 at once, 0 of 6 done" in told[0]


def test_logs_of_a_pod_without_a_node_wait_and_say_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchscan.cluster.submitting.POLL_S", 0.02)
    job = bench.api.put("jobs", TRAINING)
    pod = job_pod(job, None, 0)
    bench.api.put("pods", pod | {"status": unschedulable("no GPU")})
    told: list[str] = []

    def schedule(text: str) -> None:
        told.append(text)
        bench.api.logs["train-0-0", "worker"] = "epoch 1"
        bench.api.put("pods", pod | {"status": container_status("Succeeded", {"terminated": {"exitCode": 0}})})

    assert list(log_lines(bench.cluster(), "train", None, True, schedule)) == ["== worker", "epoch 1"]
    assert told == ["waiting for train-0-0, container worker: no node takes it: no GPU"]


def test_logs_of_a_sidecar_come_last(bench: Bench) -> None:
    """One that a service mesh has put into the pod writes until the program has ended."""
    job = bench.api.put("jobs", TRAINING)
    pod = job_pod(job, None, 0)
    proxy = {"name": "proxy", "image": "x", "restartPolicy": "Always"}
    spec = pod["spec"] | {"initContainers": [proxy, {"name": "prepare", "image": "x"}]}
    ended = {"state": {"terminated": {"exitCode": 0}}}
    started = [{"name": name, **ended} for name in ("proxy", "prepare")]
    status = container_status("Succeeded", ended["state"]) | {"initContainerStatuses": started}
    bench.api.put("pods", pod | {"spec": spec, "status": status})
    for name in ("proxy", "prepare", "worker"):
        bench.api.logs["train-0-0", name] = f"{name} says this"
    lines = list(log_lines(bench.cluster(), "train", None, True))
    assert [line for line in lines if line.startswith("==")] == ["== prepare", "== worker", "== proxy"]


def test_logs_of_an_index_of_pods_without_any_wait_for_none(bench: Bench) -> None:
    job = bench.api.put("jobs", TRAINING)
    bench.api.put("pods", job_pod(job, None, 0) | {"status": container_status("Running", {"running": {}})})
    with pytest.raises(ClusterError, match="the pods of Job train have no index: leave --index out"):
        list(log_lines(bench.cluster(), "train", 0, follow=True))


def test_logs_that_are_not_there_say_why(bench: Bench) -> None:
    """A pod that waits, one that never started, and one whose log went with its node."""
    job = bench.api.put("jobs", TRAINING)
    evicted = {"phase": "Failed", "reason": "Evicted", "message": "low on disk"}
    ran = container_status("Failed", {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}})
    for status, follow, words in (
        (unschedulable("no GPU"), False, "no log of its container worker yet: no node takes it: no GPU; --follow"),
        (evicted, True, "has ended before its container worker started: Evicted: low on disk"),
        (evicted, False, "has ended before its container worker started: Evicted: low on disk"),
        (ran | evicted, False, r"refuses \(400\): scripted fault; train-0-0: Evicted: low on disk; exit code 137"),
    ):
        bench.api.put("pods", job_pod(job, None, 0) | {"status": status})
        bench.api.faults = [("GET", "/log", 400)]
        with pytest.raises(ClusterError, match=words):
            list(log_lines(bench.cluster(), "train", None, follow))


def put_job(bench: Bench, name: str, component: str, status: Body, **metadata: Any) -> Body:
    """A Job as its controller left it."""
    labels = {"app.kubernetes.io/part-of": "patchscan", "app.kubernetes.io/component": component}
    pod = {"containers": [{"name": "worker", "env": [{"name": "DATA", "value": "s3://data"}]}]}
    spec = {"template": {"metadata": {"labels": labels}, "spec": pod}}
    return bench.api.put(
        "jobs", {"metadata": {"name": name, "labels": labels, **metadata}, "spec": spec, "status": status}
    )


def test_status_tells_pending_running_and_failed_apart_and_why(bench: Bench) -> None:
    active = {"active": 1}
    failed = {"failed": 1, "conditions": [{"type": "Failed", "status": "True", "message": "backoff limit"}]}
    suspended = {"conditions": [{"type": "Suspended", "status": "True"}]}
    pods = {
        "a-full-node": unschedulable("0/1 nodes are available"),
        "b-pulls": container_status("Pending", {"waiting": {"reason": "ErrImagePull", "message": "not found"}}),
        "c-runs": container_status("Running", {"running": {}}),
        "d-failed": container_status("Failed", {"terminated": {"exitCode": 2, "message": "patchscan: no such recipe"}}),
        "e-memory": container_status("Failed", {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
        "f-mounts": container_status("Pending", {"waiting": {"reason": "ContainerCreating"}}),
    }
    for name, status in pods.items():
        job = put_job(bench, name, "train", failed if name in ("d-failed", "e-memory") else active)
        bench.api.put("pods", job_pod(job, None, 0) | {"status": status})
    put_job(bench, "g-refused", "scan-worker", {"succeeded": 3})
    put_job(bench, "h-queued", "scan-worker", suspended, annotations={"patchscan/source": "s3://photos"})
    for kind, name, message in (
        ("Pod", "f-mounts-0-0", 'secret "patchscan-token" not found'),
        ("Job", "g-refused", "exceeded quota"),
    ):
        on = {"kind": kind, "name": name}
        event = {"metadata": {"name": name}, "involvedObject": on, "type": "Warning", "reason": "Failed"}
        bench.api.put("events", event | {"message": message})
    found = {status.job: status for status in job_statuses(bench.cluster())}
    assert {name: (one.state, one.reason) for name, one in found.items()} == {
        "a-full-node": ("pending", "1 pod waits: no node takes it: 0/1 nodes are available"),
        "b-pulls": ("pending", "1 pod waits: worker: ErrImagePull: not found"),
        "c-runs": ("running", ""),
        "d-failed": ("failed", "exit code 2, patchscan: no such recipe"),
        "e-memory": ("failed", "killed for memory (OOMKilled), its limit is that of its node"),
        "f-mounts": ("pending", '1 pod waits: Failed: secret "patchscan-token" not found'),
        "g-refused": ("pending", "Failed: exceeded quota"),
        "h-queued": ("suspended", "suspended"),
    }
    assert {one.source for one in found.values() if one.kind == "training"} == {"s3://data"}
    assert (found["h-queued"].kind, found["h-queued"].source) == ("workers", "s3://photos")
    assert (found["c-runs"].kind, found["c-runs"].pods_running, found["d-failed"].pods_failed) == ("training", 1, 1)


def test_status_quotes_the_pod_that_ended_the_job_and_a_lost_node(bench: Bench) -> None:
    """Of a training's pods, one has a wrong setting and the other was interrupted by that."""
    message = "Container worker for pod default/train-0-0 failed with exit code 2 matching FailJob rule at index 1"
    failed = {"failed": 2, "conditions": [{"type": "Failed", "status": "True", "message": message}]}
    job = put_job(bench, "train", "train", failed)
    for attempt, code, words in ((0, 2, "patchscan: no generator ldm"), (1, 75, "patchscan: interrupted")):
        status = container_status("Failed", {"terminated": {"exitCode": code, "message": words}})
        bench.api.put("pods", job_pod(job, None, attempt) | {"status": status})
    assert job_statuses(bench.cluster())[0].reason == "exit code 2, patchscan: no generator ldm"
    bench.api.delete("pods", "train-0-0")
    assert job_statuses(bench.cluster())[0].reason == message
    job = put_job(bench, "train", "train", {"active": 1})
    lost = {"reason": "NodeLost", "message": "Node n1 is unresponsive"}
    bench.api.put("pods", job_pod(job, None, 1) | {"status": container_status("Running", {"running": {}}) | lost})
    assert job_statuses(bench.cluster())[0].reason == "train-0-1: NodeLost: Node n1 is unresponsive"


def test_status_of_a_job_that_took_too_long_says_what_it_met_before(bench: Bench) -> None:
    message = "Job was active longer than specified deadline"
    job = put_job(bench, "a", "roll-out", {"conditions": [{"type": "Failed", "status": "True", "message": message}]})
    assert job_statuses(bench.cluster())[0].reason == message
    ended = {"terminated": {"exitCode": 75, "message": "patchscan: s3://models does not answer"}}
    bench.api.put("pods", job_pod(job, None, 0) | {"status": container_status("Failed", ended)})
    words = f"{message}; before that: exit code 75, patchscan: s3://models does not answer"
    assert job_statuses(bench.cluster())[0].reason == words


def test_a_kubeconfig_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = tmp_path / "config"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    for content in (b"a: [b", b"- a", b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        with pytest.raises(ClusterError, match=r"^no cluster is configured: .+; set KUBECONFIG"):
            Cluster.connect()


def test_a_proxy_is_told_the_password_in_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library sent none, and the proxy refused every request (407)."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    cluster = {"server": "https://cluster.test", "proxy-url": "http://me:p%40ss@proxy.test:3128"}
    parts = {"users": [{"name": "me", "user": {}}], "clusters": [{"name": "c", "cluster": cluster}]}
    contexts = [{"name": "x", "context": {"cluster": "c", "user": "me"}}]
    (tmp_path / "config").write_text(yaml.safe_dump(parts | {"contexts": contexts, "current-context": "x"}))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    pools = Cluster.connect()._server.api.rest_client.pool_manager
    assert pools.proxy_headers == {"proxy-authorization": "Basic " + base64.b64encode(b"me:p@ss").decode()}


def test_credentials_that_cannot_be_sent_or_are_refused_say_so(bench: Bench) -> None:
    bench.api.faults = [("GET", "/jobs", 401)]
    with pytest.raises(ClusterError, match=r"\(401\): scripted fault; the credentials are wrong or have expired"):
        bench.cluster().jobs()
    api = bench.api.client()
    api.configuration.api_key["BearerToken"] = "Bearer a-secret\n"
    with pytest.raises(ClusterError, match="does one end in a line break") as caught:
        Cluster(api, "default", patience_s=0.1).jobs()
    assert "a-secret" not in str(caught.value)


def test_status_says_why_a_job_has_fewer_pods_than_it_may(bench: Bench) -> None:
    job = put_job(bench, "scan", "scan-worker", {"active": 1})
    bench.api.put("jobs", job | {"spec": job["spec"] | {"parallelism": 2, "completions": 4}})
    bench.api.put("pods", job_pod(job, 0, 0) | {"status": container_status("Running", {"running": {}})})
    assert job_statuses(bench.cluster())[0].reason == ""
    event = {"metadata": {"name": "e"}, "involvedObject": {"kind": "Job", "name": "scan"}, "type": "Warning"}
    bench.api.put("events", event | {"reason": "FailedCreate", "message": "exceeded quota"})
    (status,) = job_statuses(bench.cluster())
    assert (status.state, status.reason) == ("running", "1 pods of at most 2 at once: FailedCreate: exceeded quota")
    # The newest is quoted, also of those that the newer events API made.
    bench.api.put("events", bench.api.all("events")[0] | {"lastTimestamp": "2026-11-27T01:00:00Z"})
    newer = event | {"reason": "PolicyViolation", "message": "no image of others", "lastTimestamp": None}
    newer |= {"metadata": {"name": "f"}, "eventTime": "2026-11-27T02:00:00.000000Z"}
    bench.api.put("events", newer)
    assert job_statuses(bench.cluster())[0].reason.endswith("PolicyViolation: no image of others")


def test_status_names_the_queue_that_a_job_waits_in(bench: Bench) -> None:
    job = put_job(bench, "a", "scan-worker", {"conditions": [{"type": "Suspended", "status": "True"}]})
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "patchscan"
    assert job_statuses(bench.cluster())[0].reason == "suspended until the queue patchscan admits it"


@pytest.fixture
def kubeconfig(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubeconfig of the bench's cluster, for commands."""
    path = str(bench.api.kubeconfig(tmp_path))
    monkeypatch.setenv("KUBECONFIG", path)
    # Read when the client library is imported, so set here too.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", path)
    monkeypatch.setenv("JOB_NAME", "coordinator")
    monkeypatch.setattr(options, "make_scorer", lambda *_: bench.scorer)


def coordinate(bench: Bench, *more: str) -> Result:
    """`patchscan scan-coordinate` of the bench's photographs."""
    arguments = ["scan-coordinate", bench.plan.source.url, "--out", bench.out.url, "--queue=", *more]
    return CliRunner().invoke(app, [*arguments, "--server", "http://serve", "--model", "stub", "--shard-objects", "2"])


@pytest.mark.usefixtures("kubeconfig")
def test_the_coordinators_command_is_a_whole_scan(bench: Bench) -> None:
    bench.cluster().create_job(coordinator_job())
    bench.trouble = lambda shard, attempt: (75, "no answer") if shard == 2 else (0, "")
    done = coordinate(bench)
    assert isinstance(done.exception, ShardsFailedError)
    assert done.exception.exit_code == 75
    bench.trouble, bench.tries = (lambda shard, attempt: (0, "")), []
    done = coordinate(bench)
    assert done.exit_code == 0, done.output
    assert "12 objects listed = 12 scored" in done.output
    assert bench.tries == [2]
    assert bench.worker_jobs() == [], "a finished scan leaves no Job"


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize(
    ("option", "value", "error"), [("--webhook", "example.org/hook", WebhookError), ("--labels", "folders", LabelError)]
)
def test_what_a_report_could_not_use_is_found_out_before_the_workers_run(
    option: str, value: str, error: type[UserError], bench: Bench
) -> None:
    bench.cluster().create_job(coordinator_job())
    assert isinstance(coordinate(bench, option, value).exception, error)
    assert bench.tries == []


@pytest.mark.usefixtures("kubeconfig")
def test_a_coordinator_that_is_ended_while_it_lists_is_no_longer_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scans of named objects would wait for it for a day."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt  # as every command handles it

    over = threading.Event()

    def listing(folder: Store) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(60)
        raise OutageError("the thread that lists would end with its process")

    bench.cluster().create_job(coordinator_job())
    bench.scorer.card = replace(bench.scorer.card, weights_sha256="b" * 64)  # all is planned anew
    monkeypatch.setattr(Folder, "objects", listing)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        coordinate(bench)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert bench.out.read(PLANNING_FILE) is None
    over.set()


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("PARALELISM", "did you mean PARALLELISM"), ("model", "did you mean MODEL")],
)
def test_a_misspelt_name_in_the_settings_ends_the_scan_and_the_roll_out(
    bench: Bench, wrong: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PARALLELISM", "AWS_ENDPOINT_URL_S3", "https_proxy", "TZ", "MALLOC_ARENA_MAX", wrong):
        monkeypatch.setenv(f"SETTING_{name}", "1")
    bench.cluster().create_job(coordinator_job())
    roll_out = ["roll-out", "ssp", "--model-store", bench.out.url, "--versions", bench.out.url]
    for done in (coordinate(bench), CliRunner().invoke(app, roll_out)):
        assert isinstance(done.exception, ClusterError)
        assert f"there is no setting {wrong}; {hint}" in str(done.exception)
    assert bench.worker_jobs() == []


@pytest.mark.usefixtures("kubeconfig")
def test_the_pods_of_a_coordinator_judge_signers_by_its_list(bench: Bench, tmp_path: Path) -> None:
    """The list travels in the plan, from where the pods read it: they get no option for it."""
    cameras, buffer = identity("cameras", authority=True), io.BytesIO()
    Image.open(io.BytesIO(image(1, side=64))).save(buffer, "JPEG")
    signed = sign(buffer.getvalue(), identity("Camera", cameras), "Camera", CAPTURED)
    Path(bench.plan.source.url, "signed.jpg").write_bytes(signed)
    (tmp_path / "list.pem").write_text(cameras.pem)
    bench.cluster().create_job(coordinator_job())
    done = coordinate(bench, "--c2pa-trust", str(tmp_path / "list.pem"))
    assert done.exit_code == 0, done.output
    plan = last_complete(bench.out)
    assert plan
    assert plan.c2pa_trust == cameras.pem
    assert table_of(bench.out, plan.scan)["signed.jpg"]["provenance"]["c2pa"] == "Trusted"


@pytest.mark.usefixtures("kubeconfig")
def test_what_the_coordinator_waits_for_is_an_event_of_its_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr(retries, "waits", retries.Waits())
    bench.cluster().create_job(coordinator_job())
    bench.api.faults = [("POST", "/jobs", 503)]
    done = coordinate(bench)
    assert done.exit_code == 0, done.output
    told = [event for event in bench.api.all("events") if event["reason"] == "Waiting"]
    assert [event["message"] for event in told] == ["waiting for the cluster's API server: 503 scripted fault"]
    assert told[0]["involvedObject"]["name"] == "coordinator"
    assert "patchscan: waiting for the cluster's API server: 503" in done.stderr


@pytest.mark.usefixtures("kubeconfig")
def test_a_model_replaced_during_the_scan_is_an_interruption_and_the_next_try_plans_anew(bench: Bench) -> None:
    bench.cluster().create_job(coordinator_job())

    def roll_out(shard: int, attempt: int) -> tuple[int, str]:
        bench.scorer.card = replace(bench.scorer.card, weights_sha256="b" * 64)
        return 2, "the server now serves another version"

    bench.trouble = roll_out
    done = coordinate(bench)
    assert isinstance(done.exception, ShardsFailedError), done.output
    assert done.exception.exit_code == 75
    assert "was replaced during the scan" in str(done.exception)
    bench.trouble = lambda shard, attempt: (0, "")
    bench.plan = plan_scan(ScanRequest(source=bench.plan.source, card=bench.scorer.card, shard_objects=2), bench.out)
    done = coordinate(bench)
    assert done.exit_code == 0, done.output
    assert "12 objects listed = 12 scored" in done.output


@pytest.mark.usefixtures("kubeconfig")
def test_status_with_watch_prints_again_when_something_has_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [{}, {}, {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}]

    def pause(seconds: float) -> None:
        if not states:
            raise KeyboardInterrupt
        put_job(bench, "train", "train", states.pop(0), creationTimestamp="2026-11-26T01:00:00Z")

    pause(0)
    monkeypatch.setattr("patchscan.cluster.commands.time.sleep", pause)
    shown = CliRunner().invoke(app, ["jobs", "status", "--watch", "--json"]).stdout
    assert [json.loads(line)[0]["state"] for line in shown.splitlines()] == ["pending", "complete"]


@pytest.mark.usefixtures("kubeconfig")
def test_the_laptops_commands(bench: Bench) -> None:
    body = coordinator_job()
    labels = {"app.kubernetes.io/part-of": "patchscan", "app.kubernetes.io/component": "scan"}
    body["metadata"]["labels"] = labels
    bench.cluster().create_job(body)
    bench.work()
    shown = CliRunner().invoke(app, ["jobs", "status"])
    assert "6 of 6" in shown.output
    assert "complete" in shown.output
    listed = {one["job"]: one for one in json.loads(CliRunner().invoke(app, ["jobs", "status", "--json"]).stdout)}
    workers = bench.worker_jobs()[0]["metadata"]["name"]
    assert (listed[workers]["kind"], listed[workers]["source"]) == ("workers", bench.plan.source.url)
    assert (listed[workers]["done"], listed[workers]["total"], listed[workers]["state"]) == (6, 6, "complete")
    # The scan's source is in the ConfigMap that its manifest names.
    bench.api.put("configmaps", {"metadata": {"name": "patchscan-settings"}, "data": {"SOURCE": "s3://photos"}})
    assert {one.source for one in job_statuses(bench.cluster())} == {bench.plan.source.url, "s3://photos"}
    assert CliRunner().invoke(app, ["jobs", "cancel", "coordinator"]).exit_code == 0
    assert (
        CliRunner()
        .invoke(app, ["jobs", "status"])
        .output.startswith("there are no Jobs of patchscan in the namespace default;")
    )
