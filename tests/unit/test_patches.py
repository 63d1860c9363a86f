"""The simplest patch is the least complex of those drawn, inside the image, and the same for the same file."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from patchscan.detector.patches import (
    Rule,
    choose_patches,
    complexity,
    cut_patches,
    grid_corners,
    random_corners,
    seed_from_pixels,
    simplest_patch,
)
from patchscan.detector.presets import PatchPreset, WholeImagePreset, preset_from_dict, preset_to_dict

sizes = st.integers(32, 80)
seeds = st.integers(0, 2**32 - 1)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def naive_complexity(patch: np.ndarray) -> int:
    """The definition, a pixel pair at a time."""
    p = patch.astype(int)
    height, width, _ = p.shape
    total = 0
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                if y + dy < height and 0 <= x + dx < width:
                    total += int(np.abs(p[y + dy, x + dx] - p[y, x]).sum())
    return total


def test_complexity_is_the_definition() -> None:
    patches = np.stack([noise(9, 9, seed) for seed in range(3)])
    assert complexity(patches).tolist() == [naive_complexity(patch) for patch in patches]


@given(height=sizes, width=sizes, seed=seeds)
def test_the_simplest_of_the_candidates_is_chosen(height: int, width: int, seed: int) -> None:
    rgb = noise(height, width, seed=1)
    chosen = simplest_patch(rgb, candidates=12, seed=seed)
    drawn = choose_patches(rgb, rule="random", count=12, seed=seed)
    scores = complexity(drawn.pixels)
    assert complexity(chosen.pixels)[0] == scores.min()
    assert np.array_equal(chosen.corners[0], drawn.corners[scores.argmin()])


@given(height=sizes, width=sizes, seed=seeds)
def test_patches_are_cut_from_inside_the_image(height: int, width: int, seed: int) -> None:
    rgb = noise(height, width)
    chosen = choose_patches(rgb, rule="random", count=5, seed=seed)
    for (x, y), pixels in zip(chosen.corners, chosen.pixels, strict=True):
        assert np.array_equal(pixels, rgb[y : y + 32, x : x + 32])
        assert pixels.shape == (32, 32, 3)


@given(height=sizes, width=sizes, count=st.integers(1, 20))
def test_a_grid_lies_inside_and_draws_nothing(height: int, width: int, count: int) -> None:
    rgb = noise(height, width)
    first, second = (choose_patches(rgb, rule="grid", count=count, seed=seed) for seed in (1, 2))
    assert np.array_equal(first.corners, second.corners)
    assert len(first.pixels) == count
    assert (first.corners >= 0).all()
    assert (first.corners <= [width - 32, height - 32]).all()


@pytest.mark.parametrize("rule", ["simplest", "random", "most_complex", "grid"])
@pytest.mark.parametrize("shape", [(70, 90), (20, 300)])
def test_a_pillow_image_gets_the_patches_of_its_array(rule: Rule, shape: tuple[int, int]) -> None:
    rgb = noise(*shape)
    of_array, of_image = (choose_patches(one, rule=rule, count=3, seed=4) for one in (rgb, Image.fromarray(rgb)))
    for name in ("pixels", "corners", "upscaled"):
        assert np.array_equal(getattr(of_array, name), getattr(of_image, name))


def test_patches_of_an_image_larger_than_a_block_of_pillows() -> None:
    rgb = np.resize(noise(1000, 997), (3000, 4000, 3))
    corners = random_corners(3000, 4000, 32, 30, seed=1)
    assert np.array_equal(cut_patches(Image.fromarray(rgb), corners, 32), cut_patches(rgb, corners, 32))


def test_equal_candidates_keep_the_first_drawn() -> None:
    flat = np.full((64, 64, 3), 7, np.uint8)
    first = random_corners(64, 64, 32, 30, seed=5)[0]
    assert np.array_equal(simplest_patch(flat, seed=5).corners[0], first)


def test_corners_of_a_seed_never_change() -> None:
    # A stored verdict can only be checked years later if the same picture still gets the same patch.
    assert (
        seed_from_pixels(np.arange(375 * 500 * 3, dtype=np.uint32).reshape(375, 500, 3).astype(np.uint8)) == 3148956512
    )
    assert random_corners(375, 500, 32, 3, seed=1496407926).tolist() == [[235, 179], [287, 240], [183, 177]]


@pytest.mark.parametrize("shape", [(8, 9), (31, 40), (33, 40), (500, 300)])
def test_a_seed_is_of_the_pixels_and_the_size(shape: tuple[int, int]) -> None:
    rgb = noise(*shape)
    assert seed_from_pixels(rgb) == seed_from_pixels(Image.fromarray(rgb))
    flat = np.zeros((*shape, 3), np.uint8)
    others = [noise(*shape, seed=1), rgb[:, ::-1], rgb[:-1], flat, flat[:, :-1], flat.transpose(1, 0, 2)]
    assert len({seed_from_pixels(other) for other in [rgb, *others]}) == 1 + len(others)


@pytest.mark.parametrize("rule", ["random", "simplest", "most_complex"])
def test_a_drawn_patch_fits_an_enlarged_image(rule: Rule) -> None:
    with pytest.raises(ValueError, match="may have 256 pixels a side, not 300"):
        PatchPreset(rule=rule, size=300)
    assert PatchPreset(rule=rule, size=256).crops(noise(20, 300), seed=0).pixels.shape == (1, 256, 256, 3)


@pytest.mark.parametrize(
    ("height", "width", "patches"),
    [(256, 256, 4), (150, 300, 4), (300, 400, 7), (500, 500, 15), (512, 512, 16), (1500, 2000, 16)],
)
def test_a_larger_image_gets_more_patches(height: int, width: int, patches: int) -> None:
    preset = PatchPreset(rule="grid", size=128, count=4, max_count=16)
    rgb = noise(height, width)
    corners = preset.crops(rgb, seed=0).corners
    assert len(np.unique(corners, axis=0)) == patches
    assert np.array_equal(corners, preset.crops(Image.fromarray(rgb), seed=1).corners)
    assert np.array_equal(corners, PatchPreset(rule="grid", size=128, count=patches).crops(rgb, seed=0).corners)


@pytest.mark.parametrize("wrong", [{"rule": "random", "max_count": 9}, {"rule": "grid", "count": 4, "max_count": 3}])
def test_a_maximum_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_count is for rule grid, and must be count to 1024"):
        PatchPreset(**wrong)


@pytest.mark.parametrize(
    ("height", "width", "count", "corners"),
    [
        (256, 256, 4, [(0, 0), (128, 0), (0, 128), (128, 128)]),
        (256, 256, 5, [(0, 0), (64, 0), (128, 0), (0, 128), (128, 128)]),
        (1000, 4000, 2, [(936, 436), (2936, 436)]),
        (4000, 1000, 2, [(436, 936), (436, 2936)]),
        (3000, 4000, 1, [(1936, 1436)]),
        (128, 128, 2, [(0, 0), (0, 0)]),
    ],
)
def test_a_grid_covers_the_image(height: int, width: int, count: int, corners: list[tuple[int, int]]) -> None:
    assert [tuple(corner) for corner in grid_corners(height, width, 128, count).tolist()] == corners


@pytest.mark.parametrize("as_image", [False, True])
def test_a_grid_continues_a_small_image_by_its_mirror_image(as_image: bool) -> None:
    rgb = noise(20, 300)
    chosen = choose_patches(Image.fromarray(rgb) if as_image else rgb, rule="grid", size=64, count=3)
    x, y = chosen.corners[0]
    assert (chosen.upscaled, y, chosen.pixels.shape) == (True, 0, (3, 64, 64, 3))
    assert np.array_equal(chosen.pixels[0][:20], rgb[:, x : x + 64])
    assert np.array_equal(chosen.pixels[0][20:40], rgb[::-1, x : x + 64])


def test_every_place_can_be_drawn() -> None:
    corners = random_corners(33, 34, 32, 500, seed=0)
    assert {tuple(corner) for corner in corners.tolist()} == {(x, y) for x in range(3) for y in range(2)}


def test_an_image_smaller_than_a_patch_is_enlarged_first() -> None:
    chosen = simplest_patch(noise(20, 300))
    assert chosen.upscaled
    assert chosen.pixels.shape == (1, 32, 32, 3)
    assert not simplest_patch(noise(32, 32)).upscaled


@pytest.mark.parametrize("preset", [PatchPreset(rule="grid", count=4), WholeImagePreset()])
def test_presets_survive_the_card(preset: PatchPreset | WholeImagePreset) -> None:
    assert preset_from_dict(preset_to_dict(preset)) == preset
    with pytest.raises(TypeError):
        preset_from_dict({**preset_to_dict(preset), "unknown": 1})


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"kind": "ensemble", "members": [{"kind": "patch"}]}, "not 'ensemble'"),
        ({"kind": "patch", "rule": "grid", "max_count": 4}, "equally many crops"),
    ],
)
def test_a_member_that_no_ensemble_can_have_is_refused(member: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset_from_dict({"kind": "ensemble", "members": [{"kind": "whole"}, member]})


@pytest.mark.parametrize("shape", [(100, 400), (400, 100), (224, 224), (9, 500)])
def test_the_whole_preset_gives_one_crop_of_its_size(shape: tuple[int, int]) -> None:
    assert WholeImagePreset().crops(noise(*shape), seed=0).pixels.shape == (1, 224, 224, 3)


@pytest.mark.parametrize("shape", [(61, 98), (98, 61), (503, 301)])
def test_the_whole_preset_is_torchvisions(shape: tuple[int, int]) -> None:
    rgb = noise(*shape)
    theirs = v2.Compose([v2.Resize(64, v2.InterpolationMode.BILINEAR), v2.CenterCrop(48)])
    ours = WholeImagePreset(size=48, resize=64, round_down=True).crops(rgb, seed=0).pixels[0]
    assert np.array_equal(ours, np.asarray(theirs(Image.fromarray(rgb))))


def test_models_of_old_cards_get_the_longer_side_rounded_to_the_nearest() -> None:
    rgb = noise(61, 98)  # 98 * 64 / 61 is 102.8
    resized = np.asarray(Image.fromarray(rgb).resize((103, 64), Image.Resampling.BILINEAR))
    preset = preset_from_dict({"kind": "whole", "size": 48, "resize": 64})
    assert np.array_equal(preset.crops(rgb, seed=0).pixels[0], resized[8:56, 27:75])


def test_a_squashed_picture_may_lose_its_margin() -> None:
    rgb = noise(61, 97)
    crops = WholeImagePreset(size=24, resize=32, squash=True, filter="bicubic", round_down=True).crops(rgb, seed=0)
    resized = np.asarray(Image.fromarray(rgb).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(crops.pixels[0], resized[4:28, 4:28])
    assert crops.corners.tolist() == [[round(4 * 97 / 32), round(4 * 61 / 32)]]
    old = preset_from_dict({"kind": "whole", "size": 24, "resize": 32, "squash": True}).crops(rgb, seed=0)
    assert np.array_equal(old.pixels[0], np.asarray(Image.fromarray(rgb).resize((24, 24), Image.Resampling.BILINEAR)))
