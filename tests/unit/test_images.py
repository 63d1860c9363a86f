"""Any bytes become pixels or one of six reasons, within limits that are checked before decoding."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from demo.sample import HostileFile, bomb, hostile_files
from patchscan.detector.images import ErrorCode, ImageError, Limits, decode

PHOTO = np.random.RandomState(0).randint(0, 256, (48, 64, 3)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def code_of(data: bytes, limits: Limits = Limits()) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.code


@pytest.mark.parametrize("file", hostile_files(), ids=lambda file: file.name)
def test_hostile_files_are_rejected_with_their_code_or_decoded(file: HostileFile) -> None:
    if file.expected is None:
        assert decode(file.data).rgb.dtype == np.uint8
    else:
        assert code_of(file.data) == file.expected


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    image = decode(encoded(Image.fromarray(PHOTO), kind))
    assert np.array_equal(image.rgb, PHOTO)
    assert (image.width, image.height, image.format) == (64, 48, kind)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "AVIF", "HEIF"])
def test_lossy_formats_decode(kind: str) -> None:
    assert decode(encoded(Image.fromarray(PHOTO), kind)).rgb.shape == PHOTO.shape


def test_16_bit_grey_keeps_its_high_byte() -> None:
    deep = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20
    image = decode(encoded(Image.fromarray(deep), "PNG"))
    assert np.array_equal(image.rgb[..., 0], deep >> 8)


def test_alpha_is_dropped_and_the_first_frame_taken() -> None:
    clear = np.dstack([PHOTO, np.zeros((48, 64), np.uint8)])
    assert np.array_equal(decode(encoded(Image.fromarray(clear), "PNG")).rgb, PHOTO)
    frames = [Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)]
    animated = decode(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    assert animated.frames == 2
    assert np.array_equal(animated.rgb, PHOTO)


def test_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.fromarray(PHOTO), "JPEG", exif=exif)).rgb.shape == PHOTO.shape


@pytest.mark.slow
def test_limits_hold_before_any_pixel_is_decoded() -> None:
    # 400 and 625 megapixels, on either side of the limit at which Pillow itself refuses.
    assert code_of(bomb(20_000)) == ErrorCode.TOO_LARGE
    assert code_of(bomb(25_000)) == ErrorCode.TOO_LARGE
    small = encoded(Image.fromarray(PHOTO), "PNG")
    assert code_of(small, Limits(max_bytes=len(small) - 1)) == ErrorCode.TOO_LARGE
    assert code_of(small, Limits(max_pixels=48 * 64 - 1)) == ErrorCode.TOO_LARGE


def test_messages_hold_no_memory_addresses() -> None:
    for file in hostile_files():
        if file.expected is not None:
            with pytest.raises(ImageError) as caught:
                decode(file.data)
            assert "0x" not in caught.value.message


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_never_escape_as_another_error(data: bytes) -> None:
    assert code_of(data) in set(ErrorCode)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "AVIF"]),
    cut=st.floats(0, 1),
    position=st.floats(0, 1),
    value=st.integers(0, 255),
)
def test_damaged_images_decode_or_are_rejected(kind: str, cut: float, position: float, value: int) -> None:
    data = bytearray(encoded(Image.fromarray(PHOTO), kind))
    data[int(position * (len(data) - 1))] = value
    # Any other exception than ImageError fails the test.
    with contextlib.suppress(ImageError):
        decode(bytes(data[: int(cut * len(data))]))
