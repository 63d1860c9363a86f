"""Write down all that the detector says of one image, so that others can check it to the bit: case.json and
case.html."""

import hashlib
import json
import platform
import shlex
import ssl
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from patchscan.common.errors import UserError
from patchscan.detector.answer import ENGINES, Answer, Engine
from patchscan.detector.card import Card
from patchscan.detector.engines import load_detector
from patchscan.detector.images import ImageError, decode, read_image
from patchscan.detector.watermark import watermarks
from patchscan.evaluation.evidence import Weight, weight_of
from patchscan.reporting import pages, plots
from patchscan.scanning.file_texts import file_texts
from patchscan.scanning.prevalence import card_rates
from patchscan.scanning.provenance import provenance
from patchscan.scanning.trust import describe_trust

CASE_SCHEMA = "patchscan-case/1"
CASE_FILE, PAGE_FILE, PICTURE_FILE = "case.json", "case.html", "views.png"
LIBRARIES = ("patchscan", "numpy", "pillow", "pillow-heif", "onnxruntime", "openvino", "torch", "c2pa-python")
MAX_TEXTS, MAX_TEXT = 100, 500
# What is compared when a case is replayed; the rest are circumstances.
REPLAYED = (
    "image", "provenance", "watermarks", "c2pa_trust", "texts", "answer", "weight", "weight_in_words", "finding",
    "model", "card_rates", "never_saw", "warnings",
)  # fmt: skip
# The scale of ENFSI's guideline for evaluative reporting (2015): from this likelihood ratio up, so much support.
SUPPORT = (
    (1_000_000, "extremely strong"),
    (10_000, "very strong"),
    (1_000, "strong"),
    (100, "moderately strong"),
    (10, "moderate"),
    (2, "weak"),
)


class CaseError(UserError):
    """A case that cannot be made or replayed; the message says why."""


class CaseDiffersError(CaseError):
    """A replayed case is not equal to what was written down."""

    exit_code = 3


def build_case(image: Path, run: Path, engine: Engine | None = None, trust: str | None = None) -> dict[str, Any]:
    """Return the content of case.json for an image file: its bytes, what it says of itself, the answer and its weight,
    the model and what it never saw, and what computed them. On a CPU, in this process. `trust`: the PEM text of the
    authorities whose signers of C2PA manifests are trusted (`trust.read_trust`), None: of none.

    Raises CaseError where the file cannot be read or scored, CardError, WeightsError and EngineError.
    """
    data = read_file(image)
    detector = load_detector(run, "cpu", engine)
    card = detector.card
    answer = detector.score([data])[0]
    if not isinstance(answer, Answer):
        message = f"{answer.code}: {answer.message}" if isinstance(answer, ImageError) else str(answer)
        raise CaseError(f"{image} cannot be scored: {message}")
    decoded = decode(data, detector.limits)
    decision = card.decision.of(answer.tier)
    weight = weight_of(answer.p_ai, answer.tier, answer.reason, card)
    return {
        "schema": CASE_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "image": {
            "name": image.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "pixels_sha256": hashlib.sha256(decoded.rgb.tobytes()).hexdigest(),
        },
        "provenance": provenance(data, decoded.format, trust),
        "watermarks": watermarks(decoded.pillow),
        "c2pa_trust": trust and {**describe_trust(trust), "pem": trust},
        "texts": [[name[:MAX_TEXT], text[:MAX_TEXT]] for name, text in file_texts(data, decoded.format)[:MAX_TEXTS]],
        "answer": asdict(answer),
        "weight": asdict(weight) | {"at_bound": weight.at_bound} if isinstance(weight, Weight) else None,
        "weight_in_words": weight_in_words(weight),
        "finding": finding(answer),
        "model": {
            **{name: getattr(card, name) for name in ("name", "version", "digest", "weights_sha256", "architecture")},
            "threshold": decision.threshold,
            "chosen_by": decision.chosen_by,
        },
        "card_rates": card_rates(card),
        "never_saw": never_saw(card),
        "warnings": card.all_warnings,
        "engine": detector.engine,
        "versions": versions(),
        "run": str(run.resolve()),
        "file": str(image.resolve()),
        "command": shlex.join(
            ["patchscan", "case", str(image), "--run", str(run), "--engine", detector.engine, "--out", "CASE"]
        ),
    }


def read_file(path: Path) -> bytes:
    """Read an image or a case. Raises CaseError."""
    try:
        return read_image(path)
    except OSError as error:
        raise CaseError(f"cannot read {path}: {error.strerror}") from error
    except ImageError as error:
        raise CaseError(f"{path} is too large: {error.message}") from error


def versions() -> dict[str, str]:
    """Return the versions of what computes a score, and the processor: another may change its last bits."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": platform.python_version(), "system": platform.platform(), "processor": _processor()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def finding(answer: Answer) -> str:
    """Say the verdict in words for a lay reader."""
    reasons = {
        "abstain_band": "its score lies where the model errs too often to decide",
        "small_image": "it is too small for the model",
        "out_of_domain": "the model cannot tell AI from real in images like this",
    }
    if answer.verdict == "ai":
        return "The detector calls this image AI-generated. That is a finding about its pixels, not a proof."
    if answer.verdict == "real":
        return (
            "The detector found none of the traces that it knows of AI generators. That does not show that the image "
            "is genuine."
        )
    return f"The detector gives no verdict on this image: {reasons[answer.reason or 'abstain_band']}."


def weight_in_words(weight: Weight | str) -> str:
    """Say what a likelihood ratio means, in one sentence, or why none is stated."""
    if isinstance(weight, str):
        return f"No likelihood ratio is stated: {weight}."
    times = 10 ** abs(weight.log10_lr)
    for_ai = "made by one of the generators that the model knows"
    for_real = "a photograph like those it was validated on"
    limit = (
        f" That is the limit of what the validation's {weight.ai:,} AI images and {weight.real:,} photographs carry."
        if weight.at_bound
        else ""
    )
    if times < SUPPORT[-1][0]:
        return (
            f"The score is about as probable for an image {for_ai} as for {for_real}, ratio {_short(weight.log10_lr)}: "
            f"it supports neither.{limit}"
        )
    likelier, other = (for_ai, for_real) if weight.log10_lr > 0 else (for_real, for_ai)
    name = next(name for least, name in SUPPORT if times >= least)
    return (
        f"The score is about {_short(abs(weight.log10_lr))} times more probable if the image is {likelier} than if it "
        f"is {other}: {name} support (ENFSI 2015).{limit} This is not the probability that the image is AI-generated: "
        "that also depends on everything else that is known of it."
    )


def _short(log10_lr: float) -> str:
    """The ratio with two significant digits."""
    return f"{float(f'{10**log10_lr:.2g}'):,g}"


def never_saw(card: Card) -> list[str]:
    """Say, one sentence each, what the model was not trained or measured on."""
    seen, unseen = card.training.get("seen", []), card.training.get("unseen", [])
    found = [
        (
            f"Its training images came from {', '.join(sorted(seen))}. Of every other generator, newer ones above all, "
            "it has seen nothing."
        )
        if seen
        else "The card does not say which generators it was trained on: it may have seen none that matters here."
    ]
    if unseen:
        found.append(f"It was measured on {', '.join(sorted(unseen))} without having been trained on them.")
    return [
        *found,
        "It saw fully generated images and photographs: it was not trained to find generated parts of a photograph.",
        "It looks at fine detail of the pixels. It does not know what the picture shows, or whether it is true.",
    ]


def write_case(case: dict[str, Any], image: Path, run: Path, out: Path) -> dict[str, Any]:
    """Write case.json, case.html and, where torch is installed, the picture of what the model looked at, into `out`.
    Returns the case as written."""
    out.mkdir(parents=True, exist_ok=True)
    picture, doubts = None, []
    if find_spec("torch"):
        from patchscan.evaluation.explain_picture import write_explanation

        explanation = write_explanation(run, image, out / PICTURE_FILE)
        picture = (out / PICTURE_FILE).read_bytes()
        doubts = [doubt for doubt in explanation.doubts if doubt not in case["warnings"]]
    case = case | {"doubts": doubts, "picture_sha256": hashlib.sha256(picture).hexdigest() if picture else None}
    pages.write_json(out / CASE_FILE, case)
    uri = plots.data_uri(picture) if picture else None
    pages.write_text(out / PAGE_FILE, pages.render("patchscan.scanning", "case.html", case, picture=uri))
    return case


def read_case(path: Path) -> dict[str, Any]:
    """Read a case.json. Raises CaseError."""
    try:
        case = json.loads(read_file(path))
        if case["schema"] != CASE_SCHEMA or not all(name in case for name in (*REPLAYED, "versions")):
            raise ValueError(f"its schema is {case['schema']!r}")
        if case["engine"] not in ENGINES or not isinstance(case["versions"], dict):
            raise ValueError(f"its engine is {case['engine']!r}")
        if case["c2pa_trust"] is not None:
            describe_trust(case["c2pa_trust"]["pem"])
        if not isinstance(case["file"], str) or not isinstance(case["run"], str):
            raise ValueError("its file and run are no paths")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ssl.SSLError) as error:
        raise CaseError(f"{path} is no case as `patchscan case` writes it ({error})") from error
    return dict(case)


def differences(case: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between a case and its replay, one line each: fields by their path, values as JSON."""
    lines: list[str] = []
    for name in REPLAYED:
        old, new = _flat(name, case[name]), _flat(name, json.loads(json.dumps(now[name])))
        lines += [
            f"{path}: {old.get(path, 'nothing')} was written, {new.get(path, 'nothing')} is found now"
            for path in dict.fromkeys([*old, *new])
            if old.get(path) != new.get(path) and path != "image.name"
        ]
    return lines


def _flat(path: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {key: text for name, one in value.items() for key, text in _flat(f"{path}.{name}", one).items()}
    return {path: json.dumps(value)}


def changed_versions(case: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which versions, and whether the processor, are others than the case's."""
    return [
        f"{name} {case['versions'].get(name, 'unknown')}, now {found}"
        for name, found in now["versions"].items()
        if case["versions"].get(name) != found
    ]
