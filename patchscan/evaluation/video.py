"""Score frames of a video, evenly spread over it, and report their mean with an interval that takes into account that
neighbouring frames are similar."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib.figure import Figure

from patchscan.common.console import ProgressReport
from patchscan.common.errors import UserError
from patchscan.detector.answer import Answer
from patchscan.detector.base import BaseDetector
from patchscan.detector.card import Decision
from patchscan.detector.engines import load_any
from patchscan.evaluation.disturbances import png
from patchscan.reporting import plots
from patchscan.reporting.pages import render, show, write_json, write_text
from patchscan.reporting.statistics import half_width

SCHEMA = "patchscan-video/1"
BATCH = 16
BLOCKS, LEAST_FRAMES = 5, 20
ANSWERED = ("p_ai", "logit", "verdict", "reason", "tier")
WARNING = (
    "The model was trained on still images. Video is compressed more strongly than most photographs, which can remove "
    "or imitate a generator's traces. Take this as a hint where to look, not as a verdict on the video."
)


class VideoError(UserError):
    """The file cannot be read as a video; the message says why."""


@dataclass(frozen=True)
class Frame:
    """One sampled frame: `number` in decoding order, `second` since the file's start, as players count, `png` its
    pixels, lossless."""

    number: int
    second: float
    png: bytes


def frame_numbers(video: Path, count: int) -> list[int]:
    """Return the numbers of `count` frames spread evenly over the video, or of all frames if there are fewer.

    Raises VideoError if the file cannot be read or holds no video.
    """
    total = _count_frames(video)
    result: list[int] = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    return result


def sample_frames(video: Path, numbers: list[int]) -> Iterator[Frame]:
    """Yield the frames of these numbers in order, decoded in one pass. A damaged file may yield fewer; VideoError is
    raised if not even its first frame can be decoded."""
    wanted, decoded = set(numbers), 0
    with _open(video) as container:
        # A broadcast's clock, or that of the recording that the file was cut from, does not begin at 0.
        start = (container.start_time or 0) / av.time_base
        try:
            for number, frame in enumerate(container.decode(_moving_pictures(container))):
                decoded += 1
                if number in wanted:
                    yield Frame(number, float(frame.time or start) - start, png(frame.to_image()))
        except av.FFmpegError as error:
            if not decoded:
                raise VideoError(f"{video} is damaged: no frame can be decoded") from error


def _open(video: Path) -> Any:
    try:
        container = av.open(f"file:{video}")  # a name such as `12:30.mp4` would name a protocol
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"cannot read {video} as a video: {error.strerror or error}") from error
    if _moving_pictures(container) is None:
        container.close()
        raise VideoError(f"{video} contains no video stream")
    return container


def _moving_pictures(container: Any) -> Any:
    """The first video stream, None where there is none: the cover of a song is a stream too."""
    cover = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if cover not in stream.disposition), None)


def _count_frames(video: Path) -> int:
    # Packets are counted, because containers state the number of frames wrongly or not at all. Those that a cut has
    # left in the file for the frames after them only give no frame.
    with _open(video) as container:
        try:
            packets = container.demux(_moving_pictures(container))
            count = sum(packet.size > 0 and not packet.is_discard for packet in packets)
        except av.FFmpegError as error:
            raise VideoError(f"cannot read {video} as a video: {error.strerror}") from error
    if not count:
        raise VideoError(f"{video} contains no frames")
    result: int = count
    return result


def interval_of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of a series of correlated shares, within 0..1, by Student's t of the means
    of BLOCKS blocks (batch means; Schmeiser, Operations Research 1982); None for fewer than LEAST_FRAMES values."""
    if len(values) < LEAST_FRAMES:
        return None
    # Few blocks are long ones, whose means are nearly independent: a bootstrap of ten short ones is far too narrow.
    blocks = [float(block.mean()) for block in np.array_split(values, BLOCKS)]
    half = half_width(blocks)
    mean = float(values.mean())
    return max(0.0, mean - half), min(1.0, mean + half)


def score_video(detector: BaseDetector, video: Path, numbers: list[int]) -> list[dict[str, Any]]:
    """Score the frames of these numbers: one row per frame with number, second, p_ai, logit, verdict with its reason,
    tier and error code. Frames that a damaged file no longer contains have no row."""
    rows: list[dict[str, Any]] = []
    with ProgressReport("score frames", len(numbers), "frames") as progress:
        frames = sample_frames(video, numbers)
        while batch := list(islice(frames, BATCH)):
            rows += _score(detector, batch)
            progress.advance(len(batch))
    return rows


def _score(detector: BaseDetector, frames: list[Frame]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for frame, answer in zip(frames, detector.score([frame.png for frame in frames]), strict=True):
        row: dict[str, Any] = {"frame": frame.number, "second": frame.second}
        if isinstance(answer, Answer):
            row |= {name: getattr(answer, name) for name in ANSWERED} | {"error_code": None}
        else:
            row |= dict.fromkeys(ANSWERED) | {"error_code": str(answer.code)}
        rows.append(row)
    return rows


def summarise(rows: list[dict[str, Any]], decision: Decision) -> dict[str, Any]:
    """Compute the mean p_ai with its interval, the number of frames by verdict, and the finding in words."""
    scored = [row for row in rows if row["p_ai"] is not None]
    values = np.array([row["p_ai"] for row in scored])
    bounds = interval_of_mean(values)
    mean = float(values.mean()) if len(values) else None
    verdicts = {name: sum(row["verdict"] == name for row in scored) for name in ("ai", "real", "uncertain")}
    if mean is None:
        finding = "No frame could be scored."
    elif bounds is None:
        finding = f"Mean p_ai {show(mean, '3')} over {len(scored)} frames, too few for an interval."
    else:
        low, high = bounds
        where = "above" if low > decision.threshold else "below" if high < decision.threshold else "on both sides of"
        bottom, top, threshold = (show(value, "3") for value in (low, high, decision.threshold))
        finding = (
            f"Mean p_ai {show(mean, '3')}, 95 % interval {bottom} to {top} over {len(scored)} frames: "
            f"{where} the threshold of {threshold}."
        )
    without = sum(row["reason"] in ("out_of_domain", "small_image") for row in scored)
    if without:
        finding += f" {without} of these frames get no verdict: in images like them the model cannot tell AI from real."
    low_end, high_end = bounds or (None, None)
    return {
        "mean_p_ai": {"value": mean, "low": low_end, "high": high_end},
        "frames": len(rows),
        "scored": len(scored),
        "verdicts": verdicts,
        "finding": finding,
    }


@plots.styled
def draw_video(rows: list[dict[str, Any]], summary: dict[str, Any], decision: Decision) -> Figure:
    """Draw p_ai over time, with the mean and its interval, the threshold and the abstain band."""
    drawing, axes = plots.figure(9.6, 3.4)
    axis = axes[0, 0]
    scored = [row for row in rows if row["p_ai"] is not None]
    if decision.abstain_high > decision.abstain_low:
        axis.axhspan(decision.abstain_low, decision.abstain_high, color=plots.BAND_COLOUR, zorder=0, label="uncertain")
    axis.axhline(decision.threshold, color=plots.INK, linewidth=1, label="threshold")
    seconds = [row["second"] for row in scored]
    axis.plot(seconds, [row["p_ai"] for row in scored], color=plots.AI_COLOUR, marker="o", markersize=3, linewidth=1,
              label="frame")  # fmt: skip
    mean = summary["mean_p_ai"]
    if mean["low"] is not None:
        axis.axhspan(mean["low"], mean["high"], color=plots.REAL_COLOUR, alpha=0.15, label="mean, 95 % interval")
    if mean["value"] is not None:
        axis.axhline(mean["value"], color=plots.REAL_COLOUR, linewidth=1.2)
    axis.set(xlabel="seconds", ylabel="p_ai", ylim=(-0.02, 1.02))
    axis.grid(True)
    drawing.legend(loc="outside upper right", fontsize=8, ncols=4)
    return drawing


def write_video_report(run: Path, video: Path, out: Path, frames: int, device: str) -> dict[str, Any]:
    """Score a video and write video.json, video.png and report.html into `out`; returns video.json's content."""
    detector = load_any(run, device)
    card = detector.card
    numbers = frame_numbers(video, frames)
    rows = score_video(detector, video, numbers)
    warnings = [WARNING, *card.all_warnings]
    if len(rows) < len(numbers):
        lost = len(numbers) - len(rows)
        warnings.insert(0, f"The file is damaged: {lost} of the {len(numbers)} sampled frames could not be decoded.")
    # Frames of one video look alike: the numbers of the tier that most of them look like serve the summary.
    tiers = Counter(row["tier"] for row in rows if row["tier"])
    decision = card.decision.of(tiers.most_common(1)[0][0]) if tiers else card.decision
    summary = summarise(rows, decision)
    report = {
        "schema": SCHEMA,
        "video": video.name,
        "model": {"name": card.name, "version": card.version, "digest": card.digest},
        "threshold": decision.threshold,
        **summary,
        "warnings": warnings,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    picture = plots.write_png(draw_video(rows, summary, decision), out / "video.png")
    write_json(out / "video.json", report)
    write_text(out / "report.html", render("patchscan.evaluation", "video.html", report, images={"video": picture}))
    return report
