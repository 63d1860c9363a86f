"""Every metric against scikit-learn or a plain loop, and on data that hardly allow any."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from sklearn import metrics as sk

from patchscan.evaluation.metrics import RESAMPLED, Scored, confusion, from_counts, measure, resampled_counts
from patchscan.reporting.plots import risk_coverage
from patchscan.reporting.statistics import proportion, wilson

RATES = ("accuracy", "balanced_accuracy", "fake_detection", "real_detection", "precision_ai", "precision_real")


def scored(label: np.ndarray, logit: np.ndarray, uncertain: np.ndarray | None = None) -> Scored:
    p_ai = 1 / (1 + np.exp(-logit))
    nobody = np.zeros(len(label), bool)
    return Scored(label, logit, p_ai, p_ai >= 0.5, nobody if uncertain is None else uncertain, label)


def sample(n: int = 150, seed: int = 0) -> Scored:
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < 0.4).astype(int)
    return scored(label, rng.normal(label * 1.5 - 0.75, 1).round(1))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_sklearn(seed: int) -> None:
    one = sample(seed=seed)
    ours = {name: estimate.value for name, estimate in measure(one, resamples=20).items()}
    label, says = one.label, one.says_ai.astype(int)
    expected = {
        "accuracy": sk.accuracy_score(label, says),
        "balanced_accuracy": sk.balanced_accuracy_score(label, says),
        "auc": sk.roc_auc_score(label, one.logit),
        "average_precision": sk.average_precision_score(label, one.logit),
        "precision_ai": sk.precision_score(label, says),
        "precision_real": sk.precision_score(label, says, pos_label=0),
        "fake_detection": sk.recall_score(label, says),
        "real_detection": sk.recall_score(label, says, pos_label=0),
        "f1_ai": sk.f1_score(label, says),
        "f1_real": sk.f1_score(label, says, pos_label=0),
        "brier": sk.brier_score_loss(label, one.p_ai),
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    fpr, tpr, _ = sk.roc_curve(label, one.logit, drop_intermediate=False)
    assert ours["tpr_at_fpr_1"] == pytest.approx(tpr[fpr <= 0.01].max())
    assert ours["tpr_at_fpr_5"] == pytest.approx(tpr[fpr <= 0.05].max())
    eer = ours["eer"]
    assert eer is not None
    assert np.interp(eer, fpr, tpr) == pytest.approx(1 - eer, abs=1e-9)


def test_tpr_at_a_false_alarm_in_a_thousand_needs_a_thousand_real_images() -> None:
    rng = np.random.default_rng(8)
    label = np.repeat([1, 0], [300, 1000])
    one = scored(label, rng.normal(label * 3, 1))
    fpr, tpr, _ = sk.roc_curve(label, one.logit, drop_intermediate=False)
    found = measure(one)["tpr_at_fpr_01"]
    assert found.value == pytest.approx(tpr[fpr <= 0.001].max())
    value, low, high = found.bounds
    assert low <= value <= high
    assert measure(scored(label[:-1], one.logit[:-1]))["tpr_at_fpr_01"].value is None


def test_expected_calibration_error_by_a_plain_loop() -> None:
    one = sample()
    total = 0.0
    for low in np.arange(10) / 10:
        inside = (one.p_ai >= low) & (one.p_ai < low + 0.1)
        if inside.any():
            total += inside.mean() * abs(one.label[inside].mean() - one.p_ai[inside].mean())
    assert measure(one, resamples=20)["ece"].value == pytest.approx(total)


def test_a_resample_counts_as_if_its_images_were_written_out() -> None:
    one = sample(60)
    counts = next(resampled_counts(one.stratum, seed=1, resamples=3))
    for number in range(3):
        rows = np.repeat(np.arange(60), counts[number].astype(int))
        again = Scored(*(values[rows] for values in vars(one).values() if values is not None))
        written_out = from_counts(again, np.ones((1, len(rows))))
        counted = from_counts(one, counts[number : number + 1])
        assert {key: counted[key][0] for key in RESAMPLED} == pytest.approx(
            {k: written_out[k][0] for k in RESAMPLED}, nan_ok=True
        )


def test_resamples_keep_each_stratum_at_its_size() -> None:
    stratum = np.repeat([0, 1, 2], [5, 50, 7])
    counts = np.concatenate(list(resampled_counts(stratum, seed=0, resamples=40)))
    assert counts.shape == (40, 62)
    for value, size in ((0, 5), (1, 50), (2, 7)):
        assert (counts[:, stratum == value].sum(axis=1) == size).all()


def test_bootstrap_interval_of_average_precision_covers_the_truth() -> None:
    """The truth from 200,000 images; 60 samples of 120."""
    rng = np.random.default_rng(5)
    many = np.repeat([1, 0], 100_000)
    truth = sk.average_precision_score(many, rng.normal(many * 1.5, 1))
    covered = 0
    for _ in range(60):
        label = np.repeat([1, 0], 60)
        _, low, high = measure(scored(label, rng.normal(label * 1.5, 1)), resamples=200)["average_precision"].bounds
        covered += low <= truth <= high
    assert covered >= 51


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=1, max_size=12))
@example([(0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (1, -1)])
def test_intervals_hold_their_values_on_tiny_and_tied_data(images: list[tuple[int, int]]) -> None:
    label, logit = (np.array(column) for column in zip(*images, strict=True))
    for name, estimate in measure(scored(label, logit.astype(float)), resamples=50).items():
        if estimate.value is not None:
            assert 0 <= estimate.value <= 1, name
        if estimate.low is not None:
            value, low, high = estimate.bounds
            assert -1e-12 <= low <= high <= 1 + 1e-12, name
            if name in (*RATES, "auc", "ece"):
                assert low - 1e-12 <= value <= high + 1e-12, name


def test_one_class_defines_only_what_one_class_can() -> None:
    ours = measure(scored(np.ones(4, int), np.array([1.0, 2.0, -1.0, 3.0])))
    assert ours["fake_detection"].value == 0.75
    for name in ("auc", "real_detection", "balanced_accuracy", "eer", "tpr_at_fpr_1"):
        assert ours[name].value is None, name


def test_no_images_define_nothing() -> None:
    nothing = np.array([])
    ours = measure(scored(nothing.astype(int), nothing))
    assert {estimate.value for estimate in ours.values()} == {None}


def test_the_interval_of_a_detector_that_is_always_wrong_holds_its_value() -> None:
    """Images that a resample repeats are tied, and all its average precisions lie above the data's own."""
    found = measure(scored(np.repeat([1, 0], 8), np.arange(16.0)))["average_precision"]
    value, low, high = found.bounds
    assert low <= value < high


def test_perfect_separation_gives_no_false_certainty() -> None:
    label = np.repeat([1, 0], 3)
    ours = measure(scored(label, np.where(label == 1, 5.0, -5.0)))
    assert ours["average_precision"].value == 1
    assert ours["average_precision"].low is None
    assert ours["auc"].bounds[1] < 0.8
    assert ours["accuracy"].bounds[1] < 0.7


def test_abstaining_changes_coverage_and_not_accuracy() -> None:
    label, logit = np.array([1, 1, 0, 0]), np.array([2.0, -0.1, 0.1, -2.0])
    ours = measure(scored(label, logit, uncertain=np.abs(logit) < 1))
    assert ours["accuracy"].value == 0.5
    assert ours["coverage"].value == 0.5
    assert ours["selective_accuracy"].value == 1


def test_confusion_counts() -> None:
    label, logit = np.array([1, 1, 1, 0, 0]), np.array([1.0, 1.0, -1.0, 1.0, -1.0])
    assert confusion(scored(label, logit)) == {"true_ai": 2, "missed_ai": 1, "false_ai": 1, "true_real": 1}


def clustered(rng: np.random.Generator, sources: int = 40, each: int = 10) -> Scored:
    """Images of sources that are alike: a photographer's are mostly all taken for AI, or none."""
    cluster = np.repeat(np.arange(sources), each)
    label = (cluster % 2).astype(int)
    logit = rng.normal(0, 1, sources)[cluster] + rng.normal(0, 0.5, sources * each) + 1.5 * (label - 0.5)
    p_ai = 1 / (1 + np.exp(-logit))
    return Scored(label, logit, p_ai, logit >= 0, np.zeros(len(label), bool), label, cluster)


@pytest.mark.slow
def test_intervals_count_sources_where_images_of_one_are_alike() -> None:
    truth = {"accuracy": float(ndtr(0.75 / np.sqrt(1.25))), "auc": float(ndtr(1.5 / np.sqrt(2.5)))}
    held = {(name, known): 0 for name in truth for known in (True, False)}
    for seed in range(60):
        one = clustered(np.random.default_rng(seed))
        for known in (True, False):
            found = measure(one if known else replace(one, cluster=None), resamples=2)
            for name, value in truth.items():
                _, low, high = found[name].bounds
                held[name, known] += low <= value <= high
    for name in truth:
        assert held[name, True] >= 52, "of 60; 57 is 95 %"
        assert held[name, False] <= 45, "as if all images were independent"
    found = measure(clustered(np.random.default_rng(0)), resamples=200)
    assert found["accuracy"].method == "wilson, by source"
    assert found["auc"].method == "delong, by source"
    _, low, high = found["brier"].bounds
    alone = replace(clustered(np.random.default_rng(0)), cluster=None)
    _, near_low, near_high = measure(alone, resamples=200)["brier"].bounds
    assert high - low > 1.5 * (near_high - near_low)


def test_a_source_beside_several_generators_is_drawn_as_one() -> None:
    """Each of 12 photographers beside each of 4 generators: their images are in a sample for all of these, or none."""
    source, generator = np.repeat(np.arange(12), 40), np.tile(np.repeat(np.arange(4), 10), 12)
    counts = next(resampled_counts(generator, seed=0, resamples=200, cluster=source))
    assert (counts == counts[:, np.arange(480) // 40 * 40]).all()
    assert (counts.sum(axis=1) == 480).all()
    # Generators that share no source keep their sizes.
    apart = next(resampled_counts(generator, seed=0, resamples=200, cluster=source + 12 * generator))
    assert all((apart[:, generator == one].sum(axis=1) == 120).all() for one in range(4))


def test_risk_over_coverage_is_drawn_where_confidence_changes() -> None:
    """Of images that are equally sure, none are the surest 20: their order in the table is not the model's."""
    confidence, right = np.repeat([1.0, 0.5], 50), np.repeat([False, True, False, True], 25)
    drawing = risk_coverage({"some": (confidence, right)}, {})
    line = drawing.axes[0].lines[0]
    assert np.asarray(line.get_xydata()).tolist() == [[0.5, 0.5], [1.0, 0.5]]


def test_sources_of_one_image_each_change_nothing() -> None:
    one = replace(clustered(np.random.default_rng(0)), cluster=None)
    alone = replace(one, cluster=np.arange(len(one)))
    assert measure(one, resamples=50) == measure(alone, resamples=50)


def test_a_rate_without_errors_is_as_sure_as_its_sources_are_many() -> None:
    everything = np.ones(100, bool)
    assert proportion(everything).bounds == pytest.approx(wilson(100, 100).bounds)
    assert proportion(everything, np.arange(100) // 10).bounds == pytest.approx(wilson(10, 10).bounds)
    assert proportion(everything[:0], np.arange(0)).value is None
