"""Deliveries do what the tier says, the same every time; the tier and the decision depend on the pixels alone."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import logit as log_odds

from patchscan.detector.answer import TIERS, Tier
from patchscan.detector.card import Card, Decision
from patchscan.detector.images import decode
from patchscan.detector.patches import Patches
from patchscan.detector.prepared import Prepared, build_answer
from patchscan.detector.presets import PatchPreset
from patchscan.detector.tier import LEAST_SIDE, estimate_tier
from patchscan.evaluation.calibration import Target, decide, fit_decision
from patchscan.evaluation.disturbances import jpeg, png
from patchscan.evaluation.tiers import deliver

# Images to measure on; a newcomer's machine does not have them.
DATA = Path(__file__).parents[3] / "shared/data/genmix"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth gradient with noise."""
    rng = np.random.default_rng(seed)
    grey = np.linspace(40, 210, width)[None, :, None] + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("tier", TIERS)
def test_a_delivery_depends_on_the_pixels_alone(tier: Tier) -> None:
    once = jpeg(picture(300, 200), 90)
    wrapped = png(opened(once).convert("RGB"))
    assert deliver(once, tier) == deliver(once, tier)
    if tier == "native":
        assert deliver(once, tier) == once
    else:
        assert deliver(wrapped, tier) == deliver(once, tier)
    assert deliver(b"no image", tier) == b"no image"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "web", "hard"),
    [((2000, 1000), (1024, 512), (765, 381)), ((800, 400), (800, 400), (597, 297)), ((64, 48), (64, 48), (45, 33))],
)
def test_large_pictures_are_reduced_to_the_tier_and_small_ones_as_stated(
    size: tuple[int, int], web: tuple[int, int], hard: tuple[int, int]
) -> None:
    data = png(picture(*size))
    assert opened(deliver(data, "web")).size == web
    assert opened(deliver(data, "hard")).size == hard
    enlarged = opened(deliver(data, "enlarged"))
    assert max(enlarged.size) <= 2048
    if max(size) < 1000:
        assert 1.49 * size[0] <= enlarged.width <= 2.01 * size[0]


def test_qualities_and_formats_are_those_of_the_tier() -> None:
    for tier, quality in (("web", 75), ("hard", 50)):
        delivered = [deliver(png(picture(96, 96, seed)), tier) for seed in range(30)]  # type: ignore[arg-type]
        formats = [opened(data).format for data in delivered]
        assert 3 <= formats.count("WEBP") <= 17  # of 30 with a chance of 0.3
        assert {decode(data).jpeg_quality for data in delivered} == {quality, None}


def test_a_lossless_copy_looks_like_the_same_tier_but_has_no_jpeg_quality() -> None:
    for tier in TIERS:
        image = decode(deliver(jpeg(picture(256, 256), 92), tier))
        copy = decode(png(image.pillow))
        assert estimate_tier(copy.pillow) == estimate_tier(image.pillow)
        assert copy.jpeg_quality is None


def test_any_size_has_a_tier_and_a_tiny_one_is_native() -> None:
    assert estimate_tier(picture(LEAST_SIDE - 1, 500)) == "native"
    for width, height in ((LEAST_SIDE, LEAST_SIDE), (31, 4000), (257, 130), (3000, 200)):
        assert estimate_tier(picture(width, height)) in TIERS
    assert estimate_tier(Image.new("RGB", (300, 300))) in TIERS


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs images to measure on: {DATA} is missing")
def test_most_deliveries_of_real_pictures_are_told_from_their_pixels() -> None:
    files = sorted(DATA.glob("*/val/*/*.jpg"))[::80]
    right = {
        tier: np.mean([estimate_tier(decode(deliver(file.read_bytes(), tier)).pillow) == tier for file in files])
        for tier in TIERS
    }
    assert len(files) > 20
    assert min(right["web"], right["hard"], right["enlarged"]) > 0.65, right
    assert right["native"] > 0.4, right  # many of the stored crops were compressed before


def card(decision: Decision) -> Card:
    return Card(
        name="test", version="1", architecture="ssp-lite", preset=PatchPreset(), weights_sha256="0", decision=decision
    )


def prepared(tier: Tier) -> Prepared:
    crops = Patches(np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 2), int), upscaled=False)
    return Prepared({"width": 64, "height": 64, "format": "PNG", "frames": 1}, tier, False, 80, "none", crops, 0.0, 0.0)


def test_each_tier_is_decided_by_its_own_numbers() -> None:
    decision = Decision(tiers={"web": Decision(threshold=0.9, abstain_low=0.2, abstain_high=0.9), "hard": None})
    logit = float(log_odds(0.7))
    answers = {tier: build_answer(prepared(tier), logit, card(decision), "torch") for tier in TIERS}
    assert {tier: (one.verdict, one.reason) for tier, one in answers.items()} == {
        "native": ("ai", None),
        "web": ("uncertain", "abstain_band"),
        "hard": ("uncertain", "out_of_domain"),
        "enlarged": ("ai", None),
    }
    assert (answers["web"].tier, answers["web"].jpeg_quality) == ("web", 80)


def test_a_card_keeps_its_tiers_and_an_older_one_has_none(tmp_path: Path) -> None:
    made = card(Decision(tiers={"web": Decision(threshold=0.9), "enlarged": None}))
    made.write(tmp_path)
    assert Card.read(tmp_path) == made
    assert made.digest != card(Decision()).digest
    old = {key: value for key, value in vars(Decision()).items() if key != "tiers"}
    assert Decision.from_dict(old) == Decision()
    with pytest.raises(ValueError, match="tiers"):
        replace(made.decision, tiers={"print": None})


def simulated(rng: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits whose level and spread differ by tier, labels and tiers."""
    tier = np.repeat(TIERS, images)
    label = np.tile([0, 1], 2 * images)
    shift = {"native": 0.0, "web": -1.0, "hard": 2.0, "enlarged": 4.0}
    spread = {"native": 1.0, "web": 0.5, "hard": 1.0, "enlarged": 2.0}
    noise = rng.normal(0, 1, len(tier))
    logit = np.array([shift[one] for one in tier]) + np.array([spread[one] for one in tier]) * (noise + 2 * label)
    return logit, label, tier


def test_of_photographs_of_a_tier_at_most_the_promised_share_is_called_ai() -> None:
    rng = np.random.default_rng(0)
    called: dict[str, list[float]] = {tier: [] for tier in TIERS}
    for _ in range(20):
        logit, label, tier = simulated(rng, 120)
        decision = fit_decision(logit, label, Target(max_fpr=0.1), "a simulation", tier)
        logit, label, tier = simulated(rng, 1000)
        says_ai = decide(logit, decision, tier).says_ai
        for one in TIERS:
            called[one].append(says_ai[(tier == one) & (label == 0)].mean())
    shares = {tier: float(np.mean(values)) for tier, values in called.items()}
    # 60 photographs promise a share between 0.1 - 1/61 and 0.1; one run's share deviates by 0.04, a mean of 20 by 0.01.
    assert all(0.06 < share < 0.12 for share in shares.values()), shares
    one_for_all = fit_decision(logit, label, Target(max_fpr=0.1), "a simulation")
    assert decide(logit, one_for_all).says_ai[(tier == "enlarged") & (label == 0)].mean() > 0.25


def test_a_tier_that_scores_cannot_tell_apart_is_out_of_domain() -> None:
    rng = np.random.default_rng(0)
    logit, label, tier = simulated(rng, 100)
    guess = tier == "enlarged"
    logit[guess] = rng.normal(-0.2 * label[guess], 1)
    decision = fit_decision(logit, label, Target(), "a simulation", tier)
    assert [decision.covers(one) for one in TIERS] == [True, True, True, False]
    assert decide(logit, decision, tier).uncertain[guess].all()


def test_a_tier_is_covered_by_sources_not_by_their_images() -> None:
    """Twenty images of each of four photographers, of whom one looks real: many images, but four people."""
    rng = np.random.default_rng(0)
    logit, label, tier = simulated(rng, 100)
    source = np.arange(len(logit))
    four = np.repeat([0, 1, 2, 3], 20)
    logit = np.concatenate([logit, np.repeat([1.0, 0.9, -1.0, 0.0], 20) + rng.normal(0, 0.1, 80)])
    label, tier = np.concatenate([label, np.isin(four, [0, 2])]), np.concatenate([tier, np.repeat("other", 80)])
    tier[tier == "enlarged"], tier[-80:] = "web", "enlarged"
    source = np.concatenate([source, len(source) + four])
    logit[-80:][four == 2] = 0.95
    by_image, by_source = (fit_decision(logit, label, Target(), "a test", tier, one) for one in (None, source))
    assert by_image.covers("enlarged")
    assert not by_source.covers("enlarged")
