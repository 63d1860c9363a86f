"""Predictions through `patchscan serve`: every kind of request and image, the scores of evaluation to the bit, metrics
and health that tell the truth."""

import base64
import gzip
import io
import json
import re
import subprocess
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from demo.sample import HostileFile, hostile_files
from patchscan.common.errors import UserError
from patchscan.detector.answer import Answer
from patchscan.detector.detector import Detector
from patchscan.serving.archive import archive
from patchscan.serving.server import HANDLERS, TorchServe
from patchscan.storage import open_store
from tests.command import environment, patchscan
from tests.docs import PAGES, blocks
from tests.poisonous import ABORT, CRASH, EAT, HARMLESS, POISON, POISONED, bmp
from tests.scan_kit import scan_names, table_of
from tests.serving_kit import METRICS_LAG_S, Served, encoded, picture, png, rewritten, tar_of, tiny_run, zip_of

PHOTO = Image.fromarray(picture(7))


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(served: Served) -> Detector:
    """The run folder in this process, as evaluation loads it."""
    return Detector.load(served.run)


def ask(client: httpx.Client, body: bytes, kind: str = "application/octet-stream", path: str = "tiny") -> Any:
    reply = client.post(f"/predictions/{path}", content=body, headers={"Content-Type": kind})
    assert reply.status_code == 200, reply.text
    assert reply.headers["Content-Type"].startswith("application/json")
    return reply.json()


def expected(model: Detector, data: bytes) -> dict[str, Any]:
    (answer,) = model.score([data])
    assert isinstance(answer, Answer), answer
    return asdict(answer)


def deep_png() -> bytes:
    grey = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return exif


FRAMES = [PHOTO.rotate(180), PHOTO.rotate(90)]
FORMATS = {
    "jpeg": (encoded(PHOTO, "JPEG"), "JPEG", 1),
    "progressive": (encoded(PHOTO, "JPEG", progressive=True), "JPEG", 1),
    "turned_by_exif": (encoded(PHOTO, "JPEG", exif=turned()), "JPEG", 1),
    "cmyk": (encoded(PHOTO.convert("CMYK"), "JPEG"), "JPEG", 1),
    "png": (encoded(PHOTO, "PNG"), "PNG", 1),
    "png_16_bit": (deep_png(), "PNG", 1),
    "png_palette": (encoded(PHOTO.quantize(64), "PNG"), "PNG", 1),
    "png_alpha": (encoded(PHOTO.convert("RGBA"), "PNG"), "PNG", 1),
    "apng": (encoded(PHOTO, "PNG", save_all=True, append_images=FRAMES), "PNG", 3),
    "webp": (encoded(PHOTO, "WEBP"), "WEBP", 1),
    "gif": (encoded(PHOTO, "GIF", save_all=True, append_images=FRAMES), "GIF", 3),
    "tiff": (encoded(PHOTO, "TIFF"), "TIFF", 1),
    "bmp": (encoded(PHOTO, "BMP"), "BMP", 1),
    "avif": (encoded(PHOTO, "AVIF"), "AVIF", 1),
    "heic": (encoded(PHOTO, "HEIF"), "HEIF", 1),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_scored_as_evaluation_does(name: str, client: httpx.Client, model: Detector) -> None:
    data, kind, frames = FORMATS[name]
    answer = ask(client, data, "image/whatever")
    assert answer == expected(model, data)
    assert answer["image"] == {"width": 160, "height": 120, "format": kind, "frames": frames}


@pytest.mark.parametrize("file", hostile_files(), ids=lambda file: file.name)
def test_a_bad_image_gets_its_code(file: HostileFile, client: httpx.Client) -> None:
    reply = client.post("/predictions/tiny", content=file.data, headers={"Content-Type": "image/jpeg"})
    if file.expected is None:
        assert reply.status_code == 200
    else:
        assert reply.status_code == 422
        assert reply.json()["error"]["code"] == file.expected


def test_every_way_to_send_an_image_gives_the_same_answer(client: httpx.Client, model: Detector) -> None:
    data = png(1)
    right = expected(model, data)
    text = base64.b64encode(data).decode()
    assert ask(client, data) == right
    assert ask(client, data, path="tiny/1.0") == right
    assert ask(client, data, "application/x-www-form-urlencoded") == right  # curl --data-binary without -H
    assert ask(client, json.dumps({"data": text}).encode(), "application/json") == right
    assert ask(client, json.dumps({"data": f"data:image/png;base64,{text}"}).encode(), "application/json") == right
    for field in ("data", "image"):
        assert client.post("/predictions/tiny", files={field: ("photo.png", data, "image/png")}).json() == right
    put = client.put("/predictions/tiny", content=data)
    assert put.json() == right


def test_forms_are_their_file_and_damaged_requests_cost_their_batch_nothing(
    client: httpx.Client, model: Detector
) -> None:
    data = png(1)
    file = ("photo.png", data, "image/png")
    assert client.post("/predictions/tiny", data={"title": "x"}, files={"a": file}).json() == expected(model, data)
    two = client.post("/predictions/tiny", files=[("a", file), ("a", file)])
    assert (two.status_code, two.json()["error"]["code"]) == (400, "bad_request")
    json_type = {"Content-Type": "application/json"}
    broken = client.post("/predictions/tiny", content=b'{"data": "', headers=json_type)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "bad_request")
    lines = json.dumps({"data": base64.encodebytes(data).decode()}).encode()
    assert ask(client, lines, "application/json") == expected(model, data)
    packed = client.post("/predictions/tiny", content=gzip.compress(data), headers={"Content-Encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]["code"]) == (415, "packed")


def test_a_tar_and_a_zip_get_one_answer_a_member(client: httpx.Client, model: Detector) -> None:
    members = {"a/one.png": png(1), "broken.png": png(2)[:100], "two.png": png(3)}
    for body in (tar_of(members), zip_of(members)):
        answers = {answer.pop("name"): answer for answer in ask(client, body)["answers"]}
        assert list(answers) == list(members)
        assert answers["a/one.png"] == expected(model, members["a/one.png"])
        assert answers["two.png"] == expected(model, members["two.png"])
        assert answers["broken.png"]["error"]["code"] == "truncated"


def test_crops_cut_by_the_client_get_the_same_logits(client: httpx.Client, model: Detector) -> None:
    images = [png(seed) for seed in range(5)]
    body = io.BytesIO()
    np.save(body, np.concatenate([model.prepare(data).crops.pixels for data in images]))
    reply = ask(client, body.getvalue(), "application/x-npy")
    assert reply["logits"] == [expected(model, data)["logit"] for data in images]
    assert reply["digest"] == model.card.digest


@pytest.mark.parametrize("binary", [True, False])
def test_a_client_of_the_open_inference_protocol_is_answered(binary: bool, served: Served, model: Detector) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs pip install 'tritonclient[http]'")
    headers = {"Authorization": f"Bearer {served.token_file.read_text().split()[0]}"}
    images = [png(1), png(2)]
    right = [expected(model, data) for data in images]
    with triton.InferenceServerClient(served.said["inference"].removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny", headers=headers)
        assert client.get_model_metadata("tiny", headers=headers)["versions"] == ["1.0"]

        def infer(name: str, kind: str, values: np.ndarray, *outputs: str, version: str = "") -> Any:
            tensor = triton.InferInput(name, values.shape, kind)
            tensor.set_data_from_numpy(values, binary_data=binary)
            wanted = [triton.InferRequestedOutput(one, binary_data=binary) for one in outputs] or None
            return client.infer("tiny", [tensor], version, wanted, request_id="7", headers=headers)

        sent = images if binary else [base64.b64encode(data) for data in images]
        for outputs in ((), ("p_ai", "verdict", "answer")):
            reply = infer("image", "BYTES", np.array(sent, np.object_), *outputs, version="1.0")
            assert reply.get_response()["id"] == "7"
            assert reply.as_numpy("p_ai").tolist() == [one["p_ai"] for one in right]
            assert [json.loads(one) for one in reply.as_numpy("answer")] == right
        crops = np.concatenate([model.prepare(data).crops.pixels for data in images])
        assert infer("crops", "UINT8", crops).as_numpy("logit").tolist() == [one["logit"] for one in right]
        for bad in ([b"bm8gaW1hZ2U="], [sent[0], b"bm8gaW1hZ2U="]):
            with pytest.raises(triton.InferenceServerException, match="not an image of any known format"):
                infer("image", "BYTES", np.array(bad, np.object_))
        with pytest.raises(triton.InferenceServerException, match="missing or wrong token"):
            client.get_model_metadata("tiny")
        with pytest.raises(triton.InferenceServerException, match="there is no model at /predictions/tiny/9"):
            infer("image", "BYTES", np.array(sent, np.object_), version="9")


@pytest.mark.parametrize("kind", ["image", "crops"])
def test_an_answer_says_what_it_took_of_the_device(kind: str, client: httpx.Client, model: Detector) -> None:
    crops = io.BytesIO()
    np.save(crops, model.prepare(png(1)).crops.pixels)
    body = png(1) if kind == "image" else crops.getvalue()
    headers = client.put("/predictions/tiny", content=body).headers
    assert headers["X-Patchscan-Device"] == "cpu"
    assert 0 < float(headers["X-Patchscan-Model-Seconds"]) < 10


def test_an_image_that_cannot_be_scored_took_nothing(served: Served) -> None:
    good, bad = served.in_one_batch("tiny", [png(1), b"not an image"])
    assert float(good.headers["X-Patchscan-Model-Seconds"]) > 0
    assert float(bad.headers["X-Patchscan-Model-Seconds"]) == 0


def test_the_card_can_be_asked_for(client: httpx.Client, model: Detector) -> None:
    reply = ask(client, b'{"card": true}', "application/json")
    assert reply["digest"] == model.card.digest
    assert reply["card"]["weights_sha256"] == model.card.weights_sha256
    assert reply["takes"] == ["image", "crops"]  # what a scan's --select goes by


@pytest.mark.parametrize("size", [1, 3, 8])
def test_scores_keep_their_bits_in_any_batch(size: int, served: Served, model: Detector) -> None:
    images = [png(100 + seed, 64 + 7 * seed, 80) for seed in range(size)]
    replies = served.in_one_batch("tiny", images)
    assert [reply.json() for reply in replies] == [expected(model, data) for data in images]


def test_one_bad_image_costs_its_batch_nothing(client: httpx.Client, model: Detector) -> None:
    bodies = [png(number) if number != 3 else b"not an image" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: client.put("/predictions/tiny", content=body), bodies))
    assert [reply.status_code for reply in replies] == [200, 200, 200, 422, 200, 200, 200, 200]
    assert replies[7].json() == expected(model, bodies[7])


@pytest.fixture(scope="module")
def poisoned(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model whose archive carries a decoder that dies of certain images, as a bug of Pillow would have it."""
    folder = tmp_path_factory.mktemp("poisoned")
    made = archive(tiny_run(folder / "run", name="poisoned"), folder)
    code = zipfile.ZipFile(made).read("patchscan/detector/images.py")
    rewritten(made, served.store / made.name, {"patchscan/detector/images.py": code + POISON.read_bytes()})
    with served.management() as management:
        management.post("/models", params={"url": made.name, "initial_workers": 1, "synchronous": "true"})
        yield "poisoned"
        management.delete("/models/poisoned")
    (served.store / made.name).unlink()


@pytest.mark.parametrize(
    ("width", "why"),
    [
        (CRASH, "the decoder crashed (SIGSEGV)"),
        (ABORT, "the decoder crashed (SIGABRT)"),
        (EAT, "decoding it takes more than 192 MB of memory"),
    ],
)
def test_an_image_on_which_the_decoder_dies_costs_its_batch_nothing(
    width: int, why: str, served: Served, poisoned: str
) -> None:
    replies = served.in_one_batch(poisoned, [png(1), bmp(width), bmp(HARMLESS)])
    assert [reply.status_code for reply in replies] == [200, 422, 200]
    assert replies[1].json() == {"error": {"code": "decoder_died", "message": why}}


def test_a_scan_through_the_server_writes_the_row_that_the_client_would_see(
    served: Served, poisoned: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name, data in {"crash.bmp": bmp(CRASH), "good.png": png(1)}.items():
        (tmp_path / "photos" / name).write_bytes(data)
    tables = []
    for select in ("server", "worker"):
        out = tmp_path / select
        scan = ["scan", tmp_path / "photos", "--out", out, "--server", served.said["inference"], "--model", poisoned]
        options = ["--token-file", served.token_file, "--select", select]
        done = patchscan(*scan, *options, env=environment() | POISONED)
        assert done.returncode == 0, done.stdout + done.stderr
        store = open_store(str(out))
        tables.append(table_of(store, scan_names(store)[-1]))
    row = tables[0]["crash.bmp"]
    assert (row["status"], row["error_code"]) == ("rejected", "decoder_died")
    assert row["error_message"] == "the decoder crashed (SIGSEGV)"
    assert tables[0]["good.png"]["status"] == "scored"
    assert tables[0] == tables[1]


def test_metrics_count_what_was_answered(served: Served, client: httpx.Client) -> None:
    before = served.metrics()
    answer = ask(client, png(42))
    client.put("/predictions/tiny", content=b"text")
    time.sleep(METRICS_LAG_S)
    after = served.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown(f'patchscan_images_total{{ModelName="tiny",Verdict="{answer["verdict"]}"}}') == 1
    assert grown('patchscan_errors_total{ModelName="tiny",Code="not_an_image"}') == 1
    assert grown(f'patchscan_scores_total{{ModelName="tiny",PAi="{int(answer["p_ai"] * 10) / 10}"}}') == 1
    assert grown('patchscan_requests_total{code="200"}') == 1
    assert grown('patchscan_requests_total{code="422"}') == 1
    for part in ("decode", "patch", "model"):
        assert grown(f'patchscan_{part}_seconds_count{{ModelName="tiny"}}') == 1
        assert grown(f'patchscan_{part}_seconds_sum{{ModelName="tiny"}}') > 0
    assert grown('ts_queue_latency_microseconds{model_name="tiny",model_version="default"}') > 0
    assert after["patchscan_ready{}"] == 1


def test_the_dashboard_asks_only_for_names_that_are_exported(served: Served, client: httpx.Client) -> None:
    ask(client, png(42))
    client.put("/predictions/tiny", content=b"text")
    dashboard = json.loads((HANDLERS / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    exported = {name.partition("{")[0] for name in served.metrics()}
    asked = {name for query in queries for name in re.findall(r"\b(?:patchscan|ts)_\w+|\bRequests\dXX\b", query)}
    assert len(queries) >= 8
    assert asked <= exported


def test_health_needs_no_token_and_says_what_it_waits_for(served: Served) -> None:
    for path, status in (("/ping", "Healthy"), ("/readyz", "Healthy"), ("/livez", "Alive")):
        reply = httpx.get(served.said["inference"] + path)
        assert (reply.status_code, reply.json()["status"]) == (200, status)
    with served.management() as management:
        management.put("/models/tiny?min_worker=0&synchronous=true")
        try:
            time.sleep(1.2)
            reply = httpx.get(served.said["inference"] + "/readyz")
            assert (reply.status_code, reply.json()["waiting_for"]) == (503, ["tiny"])
            assert httpx.get(served.said["inference"] + "/livez").status_code == 200
        finally:
            management.put("/models/tiny?min_worker=1&max_worker=1&synchronous=true", timeout=120)
    wait_until_ready(served)


def wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + 120
    while httpx.get(served.said["inference"] + "/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_only_the_scratch_folder_is_written_to(served: Served) -> None:
    if not served.read_only:
        pytest.skip("this user may not mount, so the server's root is not read-only here")
    inside = ["nsenter", "-t", str(served.pid), "-m", "touch"]
    assert subprocess.run([*inside, served.store / "x"], capture_output=True, check=False).returncode != 0
    assert subprocess.run([*inside, served.scratch / "x"], capture_output=True, check=False).returncode == 0


def test_a_second_server_keeps_out_of_the_scratch_folder(served: Served) -> None:
    with pytest.raises(UserError, match="is in use by another server"):
        TorchServe(served.store, ["tiny"], folder=served.scratch).start()


def test_every_curl_of_the_documentation_works(served: Served, tmp_path: Path) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for name in ("photo.png", "photo.jpg"):  # larger than the shell takes as one argument, as photographs are
        Image.fromarray(noise).save(tmp_path / name, "PNG")
    (tmp_path / "photos.tar").write_bytes(tar_of({"a.png": png(5), "b.png": png(6)}))
    np.save(tmp_path / "crops.npy", np.zeros((8, 32, 32, 3), np.uint8))
    token = served.token_file.read_text().split()[0]
    key = json.loads(served.keys.read_text())["management"]["key"]
    said = {
        "http://127.0.0.1:8080": served.said["inference"],
        "http://127.0.0.1:8081": served.said["management"],
        "http://127.0.0.1:8082/metrics": served.said["metrics"],
        "/predictions/ssp": "/predictions/tiny",
        "/models/ssp": "/models/tiny",
    }
    scripts = [block.text for page in PAGES for block in blocks(page) if block.language == "sh"]
    lines = [line for script in scripts for line in script.splitlines() if line.startswith(("curl", "printf"))]
    assert len(lines) >= 20
    for documented_line in lines:
        line = documented_line
        for documented, real in said.items():
            line = line.replace(documented, real)
        shell = f"TOKEN={token} KEY={key}; {line.replace('curl', 'curl --fail-with-body -sS', 1)}"
        done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip() or line.startswith("printf"), line
