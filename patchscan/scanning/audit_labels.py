"""Read the labels that people save on an audit's review page, compare and combine those of several people, and keep
those of all audits in one file."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from patchscan.common.csv_rows import csv_rows, decoded_lines
from patchscan.common.files import locked
from patchscan.reporting import survey
from patchscan.scanning.audit_sample import AUDITS, AuditError, Sample
from patchscan.storage.store import Store, is_bucket

Label = Literal["ai", "real", "cannot_tell"]
LABELS: tuple[Label, ...] = get_args(Label)
# The labels of all audits of these results.
ALL_LABELS = f"{AUDITS}/labels.csv"


@dataclass(frozen=True)
class Labels:
    """What one reviewer saved: the labels by the image's number in the sample, and the numbers of the images whose
    score was shown before they were labelled."""

    audit: str
    reviewer: str
    by_number: dict[int, Label]
    score_seen: frozenset[int]


def read_labels(path: Path) -> Labels:
    """Read the JSON or CSV that a review page saved. Raises AuditError, naming the file and what is wrong with it."""
    try:
        text = decoded_lines(path.read_bytes())
        values = json.load(text) if path.suffix.lower() == ".json" else _from_csv(text)
        rows = [(int(row["number"]), row["label"], bool(row["score_seen"])) for row in values["labels"]]
        found = Labels(
            audit=str(values["audit"]),
            reviewer=str(values["reviewer"]),
            by_number={number: label for number, label, _ in rows},
            score_seen=frozenset(number for number, _, seen in rows if seen),
        )
    except OSError as error:
        raise AuditError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:  # whose text is the whole file
        raise AuditError(f"{path} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise AuditError(f"{path} holds no labels as a review page saves them, .json or .csv ({error!r})") from error
    if len(found.by_number) < len(rows):
        raise AuditError(f"{path} labels an image twice")
    if unknown := [label for label in found.by_number.values() if label not in LABELS]:
        raise AuditError(f"{path} has the label {str(unknown[0])!r}; labels are {', '.join(LABELS)}")
    if not found.by_number:
        raise AuditError(f"{path} holds no label: label images on the review page and save them")
    return found


def _from_csv(text: io.StringIO) -> dict[str, Any]:
    rows = list(csv_rows(text))
    if len({row["audit"] for row in rows}) > 1:
        raise ValueError("labels of several audits")
    first = rows[0] if rows else {"audit": "", "reviewer": ""}
    labels = [{**row, "score_seen": row["score_seen"] == "1"} for row in rows]
    return {"audit": first["audit"], "reviewer": first["reviewer"], "labels": labels}


def combine(reviewers: Sequence[Labels]) -> tuple[dict[int, Label], int]:
    """Return one label for each image, and how many images got different ones: those count as `cannot_tell`."""
    combined: dict[int, Label] = {}
    disagreed = 0
    for one in reviewers:
        for number, label in one.by_number.items():
            if combined.setdefault(number, label) != label:
                combined[number] = "cannot_tell"
                disagreed += 1
    return combined, disagreed


def agreement(first: Labels, second: Labels) -> dict[str, Any]:
    """Return how far two reviewers agree on the images that both labelled: `both`, `same`, `kappa` and the `table` of
    counts, a line for each label of the first, a column for each of the second."""
    both = sorted(set(first.by_number) & set(second.by_number))
    pairs = Counter((first.by_number[number], second.by_number[number]) for number in both)
    kappa = survey.cohen_kappa([first.by_number[one] for one in both], [second.by_number[one] for one in both])
    return {
        "both": len(both),
        "same": sum(pairs[label, label] for label in LABELS),
        "kappa": asdict(kappa),
        "table": [[pairs[one, other] for other in LABELS] for one in LABELS],
    }


def save_labels(out: Store, sample: Sample, reviewers: Sequence[Labels]) -> None:
    """Write the labels into the results, beside the audit's sample and to those of all audits. Raises AuditError and
    StoreError."""
    folder = f"{AUDITS}/{sample['audit']}"
    out.delete(f"{folder}/labels-2.json")  # of an earlier report with two reviewers
    for number, one in enumerate(reviewers, 1):
        labels = [
            {"number": key, "label": label, "score_seen": key in one.score_seen} for key, label in one.by_number.items()
        ]
        saved = {"audit": one.audit, "reviewer": one.reviewer, "labels": labels}
        out.write(f"{folder}/labels-{number}.json", json.dumps(saved, indent=1).encode())
    # Of two commands at once, one would lose the other's labels. A bucket has no lock.
    with nullcontext() if is_bucket(out.url) else locked(Path(out.url)):
        out.write(ALL_LABELS, add_to_labels(out.read(ALL_LABELS), sample, combine(reviewers)[0]))


def add_to_labels(earlier: bytes | None, sample: Sample, labels: Mapping[int, Label]) -> bytes:
    """Return the file of all audits' labels that `--labels` reads (key, label): `earlier`, and this audit's labels,
    which replace earlier ones of the same key. Columns that somebody has added stay.

    Raises AuditError where `earlier` is no such file any more."""
    columns, known = _read_all_labels(earlier or b"key,label\n")
    for row in sample["rows"]:
        if label := labels.get(row["number"]):
            known[row["key"]] = known.get(row["key"], {}) | {"key": row["key"], "label": label}
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(known[key] for key in sorted(known))
    return buffer.getvalue().encode()


def _read_all_labels(data: bytes) -> tuple[Sequence[str], dict[str, dict[str, str]]]:
    """The columns of the file of all labels, and its rows by key."""
    try:
        reader = csv_rows(decoded_lines(data))
        columns = list(reader.fieldnames or ())
        if not {"key", "label"} <= set(columns):
            raise ValueError("it lacks a column")
        return columns, {row["key"]: row for row in reader if row["label"]}
    except (ValueError, csv.Error) as error:
        raise AuditError(
            f"{ALL_LABELS} in the results is no longer a CSV in UTF-8 with the columns key and label"
            f" ({type(error).__name__}): mend or remove it, and run the same command again"
        ) from error
