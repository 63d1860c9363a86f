"""Disturbances do what their labels say, the same every time; explanations and videos state their doubts soundly."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from scipy.signal import lfilter

from patchscan.detector.card import Decision
from patchscan.evaluation.disturbances import Disturbance, disturbances
from patchscan.evaluation.explain_picture import noise_maps
from patchscan.evaluation.video import (
    ANSWERED,
    VideoError,
    frame_numbers,
    interval_of_mean,
    sample_frames,
    summarise,
)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("photograph") / "photograph.png"
    grey = np.linspace(60, 190, 64 * 96).reshape(64, 96, 1) + rng.normal(0, 8, (64, 96, 1))
    Image.fromarray(grey.clip(40, 215).astype(np.uint8).repeat(3, axis=2)).save(path)
    return path


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


@pytest.mark.parametrize("kind", disturbances(), ids=lambda kind: kind.label)
def test_a_disturbance_changes_the_file_the_same_way_every_time(kind: Disturbance, photograph: Path) -> None:
    once = kind.disturb(photograph.read_bytes())
    assert once == kind.disturb(photograph.read_bytes())
    assert once != photograph.read_bytes()
    assert not (pixels(once).shape == (64, 96, 3) and np.array_equal(pixels(once), pixels(photograph.read_bytes())))


def by_label(label: str) -> Disturbance:
    return next(kind for kind in disturbances() if kind.label == label)


def test_labels_say_what_is_done(photograph: Path) -> None:
    original = pixels(photograph.read_bytes())
    assert pixels(by_label("resized 0.5 x").disturb(photograph.read_bytes())).shape == (32, 48, 3)
    assert np.array_equal(
        pixels(by_label("middle 0.5 of each side").disturb(photograph.read_bytes())), original[16:48, 24:72]
    )
    noise = pixels(by_label("noise of 5 grey levels").disturb(photograph.read_bytes())) - original
    assert noise.std() == pytest.approx(5, rel=0.05)
    worse, better = (
        pixels(by_label(f"JPEG quality {q}").disturb(photograph.read_bytes())) - original for q in (30, 95)
    )
    assert worse.std() > 2 * better.std()
    assert Image.open(io.BytesIO(by_label("screenshot, PNG").disturb(photograph.read_bytes()))).format == "PNG"
    assert (
        Image.open(io.BytesIO(by_label("screenshot, sent as JPEG 75").disturb(photograph.read_bytes()))).format
        == "JPEG"
    )


def test_a_file_that_is_no_image_is_passed_on() -> None:
    assert disturbances()[0].disturb(b"no image") == b"no image"


def test_noise_maps_of_a_ramp_are_empty_and_of_a_point_are_not() -> None:
    ramp = np.repeat(np.arange(32, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    assert noise_maps(ramp).shape == (3, 28, 28)
    assert np.abs(noise_maps(ramp)).max() < 1e-4
    point = ramp.copy()
    point[16, 16] += 12
    assert np.abs(noise_maps(point)[0]).max() == pytest.approx(12)  # the centre of KB / 4 is -1


def test_alike_neighbours_widen_the_interval_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    apart = rng.normal(0.5, 0.1, 200)
    alike = np.repeat(rng.normal(0.5, 0.1, 10), 20)
    widths = [high - low for low, high in (interval_of_mean(apart), interval_of_mean(alike))]  # type: ignore[misc]
    assert widths[1] > 2 * widths[0]
    assert interval_of_mean(apart[:19]) is None


def test_the_interval_of_a_videos_mean_holds_where_neighbours_are_alike() -> None:
    """A bootstrap of ten short blocks holds in 80 % of these."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        series = lfilter([1], [1, -0.7], rng.normal(0, 0.05, 260))[200:] + 0.5
        low, high = interval_of_mean(series)  # type: ignore[misc]
        held += low <= 0.5 <= high
    assert held / 400 >= 0.89


def test_a_video_without_scored_frames_says_so() -> None:
    row = {"frame": 0, "second": 0.0, "error_code": "too_small", **dict.fromkeys(ANSWERED)}
    summary = summarise([row], Decision())
    assert summary["finding"] == "No frame could be scored."
    assert (summary["frames"], summary["scored"], summary["mean_p_ai"]["value"]) == (1, 0, None)


def test_a_video_of_frames_without_a_verdict_says_so() -> None:
    row = {"frame": 0, "second": 0.0, "p_ai": 0.9, "logit": 2.0, "verdict": "uncertain", "reason": "out_of_domain"}
    finding = summarise([row] * 24 + [row | {"verdict": "ai", "reason": None}] * 6, Decision())["finding"]
    assert "above the threshold" in finding
    assert "24 of these frames get no verdict" in finding


def write_video(file: Path, codec: str = "mpeg4", seconds: float = 0.0, **options: str) -> Path:
    """A video of 30 frames, 10 a second, whose clock begins at `seconds`."""
    with av.open(str(file), "w", options={"output_ts_offset": str(seconds)}) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 8 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def cut_before(source: Path, file: Path, second: float, packet: int) -> Path:
    """Copy the video from a packet on, as `ffmpeg -ss -c copy` does; what lies before `second` is not to be shown."""
    with av.open(str(source)) as whole, av.open(str(file), "w") as part:
        stream: Any = whole.streams.video[0]
        copy: Any = part.add_stream_from_template(stream)
        for one in [one for one in whole.demux(stream) if one.size][packet:]:
            assert one.pts is not None
            assert one.dts is not None
            one.pts, one.dts = one.pts - int(second / stream.time_base), one.dts - int(second / stream.time_base)
            one.stream = copy
            part.mux(one)
    return file


def test_a_video_that_was_cut_without_encoding_it_anew_is_not_called_damaged(tmp_path: Path) -> None:
    cut = cut_before(write_video(tmp_path / "whole.mp4", "libx264", g="10"), tmp_path / "cut.mp4", 1.5, 10)
    numbers = frame_numbers(cut, 100)
    assert numbers == list(range(15)), "five frames of the first second are there for the others only"
    assert [frame.second for frame in sample_frames(cut, numbers)] == pytest.approx(np.arange(15) / 10)


def test_seconds_are_counted_from_the_file_s_start(tmp_path: Path) -> None:
    recorded = write_video(tmp_path / "recorded.ts", "mpeg2video", 3600.0, bf="0")
    assert [frame.second for frame in sample_frames(recorded, [0, 29])] == pytest.approx([0.0, 2.9])


def test_a_video_s_name_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "12:30 clip.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(frame_numbers(Path("12:30 clip.mp4"), 100)) == 30


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp3"), "w") as container:
        sound: Any = container.add_stream("libmp3lame", rate=44_100)
        cover: Any = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44_100
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
        container.mux(cover.encode())
    with pytest.raises(VideoError, match="contains no video stream"):
        frame_numbers(tmp_path / "song.mp3", 10)
