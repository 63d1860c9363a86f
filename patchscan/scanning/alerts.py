"""Derive alerts from a scan's report, and send them to a signed webhook."""

import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import httpx

from patchscan.common.errors import UserError
from patchscan.common.proxies import is_loopback
from patchscan.common.retries import Retries, TransientError
from patchscan.scanning.drift import SHIFTED
from patchscan.storage.store import FailureCode

SIGNATURE, TIMESTAMP = "X-Patchscan-Signature", "X-Patchscan-Timestamp"


class WebhookError(UserError):
    """The webhook could not be delivered or its secret not read; the scan itself is complete."""


def find_alerts(report: dict[str, Any]) -> list[dict[str, str]]:
    """Return the alerts of a report, as `kind` and `message`. Kinds: `ai` where this scan called images AI, `drift`
    where the scores of new images differ from those of the earlier scan, `failed` where objects could not be
    scored, `archived` where that is because they are in cold storage, `empty` where the source holds nothing to scan.
    Objects in cold storage that an earlier scan has told of raise no alert until something about them changes."""
    found: list[dict[str, str]] = []
    new_ai = report["totals"]["new_ai"]
    scores = report["changes"] and report["changes"]["scores"]
    archived = sum(row["new"] for row in report["errors"] if row["code"] == FailureCode.ARCHIVED)
    failed = report["totals"]["failed"] - archived
    if new_ai:
        scored = report["totals"]["scored"]
        message = f"called AI-generated: {new_ai:,} of the images scored in this scan ({scored:,})"
        found.append({"kind": "ai", "message": message})
    if scores and scores["alert"]:
        message = f"the scores of new images have shifted: PSI {scores['psi']:.2f}, KS {scores['ks']:.2f}"
        found.append({"kind": "drift", "message": message + _what_else(report["changes"])})
    if failed:
        objects = "object" if failed == 1 else "objects"
        found.append({"kind": "failed", "message": f"{failed:,} {objects} could not be scored; a rerun tries again"})
    if archived:
        are = "object is" if archived == 1 else "objects are"
        message = f"{archived:,} {are} in cold storage and without a score; restore, and scan again"
        found.append({"kind": "archived", "message": message})
    if not report["totals"]["listed"]:
        filtered = report["totals"]["filtered"]
        why = (
            f"the prefix and the filters leave out all {filtered:,} objects"
            if filtered
            else "it holds no object; is it misspelt?"
        )
        found.append({"kind": "empty", "message": f"nothing to scan in {report['source']}: {why}"})
    return found


def _what_else(changes: dict[str, Any]) -> str:
    """What else has shifted, which may be why scores have."""
    also = [one["property"] for kind in ("storage", "provenance") for one in changes[kind] if one["reading"] == SHIFTED]
    return f"; so have {', '.join(also)}" if also else ""


def check_webhook(url: str) -> None:
    """Raise WebhookError where `--webhook` is no address. The error does not quote it: it may hold a token."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise WebhookError("--webhook is not an address such as https://example.org/hook")


def webhook_message(report: dict[str, Any]) -> dict[str, Any]:
    """Return the message about a finished scan that `post` sends."""
    names = ("scan", "source", "finished_at", "named", "totals", "verdicts", "alerts")
    return {"event": "scan.finished", **{name: report[name] for name in names}}


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return `sha256=` and the hexadecimal HMAC-SHA256 of `<timestamp>.<body>`; the receiver computes the same."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def post(url: str, message: dict[str, Any], secret_file: Path | None, retries: Retries | None = None) -> None:
    """POST the message as JSON, signed where a secret is given, until it is accepted. Raises WebhookError."""
    body = json.dumps(message, sort_keys=True).encode()

    def attempt() -> None:
        headers = {"Content-Type": "application/json", TIMESTAMP: str(int(time.time()))}
        if secret_file:
            headers[SIGNATURE] = sign(_secret(secret_file), headers[TIMESTAMP], body)
        try:
            reply = httpx.post(url, content=body, headers=headers, timeout=10, trust_env=not is_loopback(url))
        except httpx.TransportError as error:
            raise TransientError(type(error).__name__) from None
        except (ImportError, ValueError) as error:  # of a kind that httpx does not know
            raise WebhookError(
                f"the webhook cannot be reached through the proxy that the environment names ({error}); the scan itself"
                " is complete"
            ) from None
        if reply.status_code >= 500 or reply.status_code == 429:
            raise TransientError(f"status {reply.status_code}")
        if reply.status_code >= 300:
            raise WebhookError(f"the webhook refuses the message: status {reply.status_code}")

    try:
        (retries or Retries(deadline_s=60)).call(attempt)
    except TransientError as error:
        raise WebhookError(f"the webhook cannot be reached ({error}); the scan itself is complete") from None


def _secret(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise WebhookError(f"the webhook's secret {path} cannot be read: {error.strerror}") from error
