"""A synthetic fake keeps the photograph's content and storage, and differs only in its trace."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchscan.training.batches import EpochBatches, compressed_like, flipped
from patchscan.training.synthetic import synthetic_fake
from tests.image_tree import picture


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


@given(seed=st.integers(0, 2**31), width=st.integers(33, 90), height=st.integers(33, 90))
def test_it_has_the_photographs_shape_and_content(seed: int, width: int, height: int) -> None:
    photo = picture(1, width, height)
    fake = synthetic_fake(photo, np.random.RandomState(seed))
    assert fake.shape == photo.shape
    assert fake.dtype == np.uint8
    assert not np.array_equal(fake, photo)
    assert np.corrcoef(fake.ravel(), photo.ravel())[0, 1] > 0.9


def test_it_is_stored_as_the_photograph_was() -> None:
    photo = picture(2)
    assert np.array_equal(compressed_like(jpeg(photo, 80), photo), np.asarray(Image.open(io.BytesIO(jpeg(photo, 80)))))
    png = io.BytesIO()
    Image.fromarray(photo).save(png, "PNG")
    assert compressed_like(png.getvalue(), photo) is photo


@given(rows=st.integers(1, 200), batch=st.sampled_from([2, 4, 8]), epoch=st.integers(0, 3), start=st.integers(0, 5))
def test_processes_share_an_epoch_and_a_resumed_one_goes_on(rows: int, batch: int, epoch: int, start: int) -> None:
    def batches(rank: int, world: int, first: int = 0) -> list[list[int]]:
        sampler = EpochBatches(rows, batch, seed=1, rank=rank, world=world)
        sampler.epoch, sampler.start = epoch, first
        return list(sampler)

    whole = batches(0, 1)
    flat = [row for one in whole for row in one]
    assert len(set(flat)) == len(flat) == min(rows, max(1, rows // batch) * batch)
    shared = [sorted(a + b) for a, b in zip(batches(0, 2), batches(1, 2), strict=True)]
    assert shared == [sorted(one) for one in whole]
    start = min(start, len(whole))
    assert batches(0, 1, start) == whole[start:]


def test_all_eight_symmetries_are_drawn() -> None:
    crop = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    random = np.random.RandomState(0)
    assert len({flipped(crop, "all", random).tobytes() for _ in range(200)}) == 8
    assert len({flipped(crop, "horizontal", random).tobytes() for _ in range(50)}) == 2
    assert flipped(crop, "none", random) is crop
