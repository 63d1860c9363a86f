"""Run the demo: from sample images to a scan report, with all servers on this machine and the commands of a user.

All files are written below build/demo; a second run uses the sample and the trained model again.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from demo.sample import SEEN, UNSEEN, hostile_files, write_sample
from patchscan.common.errors import UserError
from patchscan.common.proxies import bypass_for_loopback
from patchscan.serving.server import TorchServe, find_java
from patchscan.storage.embedded_s3 import EmbeddedS3

BUILD = Path("build/demo")
RECIPE = Path(__file__).parent / "ssp-demo.yaml"
MODEL_STORE = Path("model_store")
PATCHSCAN = str(Path(sys.executable).with_name("patchscan"))
NAME = "ssp-demo"
BUCKET = "demo-uploads"
NOTICE = """\
The sample is small and its generators are two autoencoders trained here in seconds: this demo shows how
patchscan works. Its figures say nothing about the accuracy on real generators."""


def main() -> None:
    """Run the demo. Exit code 2 with one line if something is missing on the machine, 130 after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a background job of a shell starts with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    bypass_for_loopback()
    forget_aws()
    try:
        find_java()
        run_demo()
    except UserError as error:
        sys.stderr.write(f"demo: {error}\n")
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: stopped, because `{shlex.join(error.cmd[:2])}` ended with {error.returncode}")
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted; every server is stopped\n")
        sys.exit(130)


def forget_aws() -> None:
    """Leave out the user's profile, session and settings of AWS: the demo's S3 server has credentials of its own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)


def run_demo() -> None:
    """Make the sample and the bucket, train, evaluate, archive, serve with TorchServe, scan."""
    data, run = BUILD / "data", BUILD / "run"
    step("Sample images: packaged photographs, and copies of them by two small generators trained here")
    write_sample(data)
    step("An S3 server on this machine, with a bucket of images and hostile files")
    with EmbeddedS3() as s3:
        upload(s3, data)
        step("Train a detector, evaluate it on images it has not seen, archive it")
        patchscan("train", str(RECIPE), "--data", str(data), "--run", str(run))
        patchscan("evaluate", "--run", str(run), "--data", str(data), "--out", str(BUILD / "evaluation"))
        patchscan("archive", str(run), "--model-store", str(MODEL_STORE))
        step("Start TorchServe on the archive and wait until its workers are ready")
        with TorchServe(MODEL_STORE, [NAME], folder=BUILD / "torchserve") as server:
            step("Scan the bucket")
            url, keys = server.addresses.inference_url, str(server.key_file)
            scan = ["scan", f"s3://{BUCKET}", "--out", str(BUILD / "scan"), "--server", url, "--model", NAME]
            patchscan(*scan, "--token-file", keys, environment=s3.environment)
    print(f"\n{NOTICE}\n\nScan report:       {BUILD / 'scan/report.html'}")
    print(f"Evaluation report: {BUILD / 'evaluation/report.html'}")


def upload(s3: EmbeddedS3, data: Path) -> None:
    """Put the validation images of both generators and the hostile files into the bucket."""
    client = s3.client()
    client.create_bucket(Bucket=BUCKET)
    images = sorted(data.glob("*/val/*/*.jpg"))
    for image in images:
        generator, _, kind, name = image.relative_to(data).parts
        client.put_object(Bucket=BUCKET, Key=f"{generator}/{kind}/{name}", Body=image.read_bytes())
    for hostile in hostile_files():
        client.put_object(Bucket=BUCKET, Key=f"hostile/{hostile.name}", Body=hostile.data)
    print(f"{len(images)} images ({SEEN.name}, {UNSEEN.name}) and {len(hostile_files())} hostile files")


def patchscan(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Print and run one `patchscan` command."""
    print(f"$ patchscan {shlex.join(arguments)}", flush=True)
    subprocess.run([PATCHSCAN, *arguments], check=True, env={**os.environ, **(environment or {})})


def step(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
