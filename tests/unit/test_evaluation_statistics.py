"""Intervals and tests against independent libraries, and on the data where formulas break."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from MLstatkit import Delong_test
from scipy import stats
from scipy.special import ndtr
from sklearn.metrics import roc_auc_score

from patchscan.reporting.statistics import (
    Estimate,
    _clustered,
    _influence,
    accuracy_difference,
    auc_difference,
    auc_interval,
    delong_components,
    friedman,
    holm,
    mean_interval,
    mean_of_rates,
    newcombe_auc,
    population_count,
    precision_at,
    principal_components,
    proportion,
    wilson,
)
from patchscan.training import validation

RNG = np.random.default_rng(7)
LABEL = np.repeat([1, 0], [60, 90])
FIRST = RNG.normal(LABEL * 1.2, 1.0).round(1)  # rounded, so that there are ties
SECOND = RNG.normal(LABEL * 0.8, 1.0).round(1)


@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_agrees_with_scipy(successes: int, trials: int) -> None:
    successes = min(successes, trials)
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    value, low, high = wilson(successes, trials).bounds
    assert (value, low, high) == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("positives", "sampled"), [(150, 100), (10, 200), (995, 50), (500, 900)])
def test_a_sample_counts_the_population_as_often_right_as_it_says(positives: int, sampled: int) -> None:
    found = np.random.default_rng(1).hypergeometric(positives, 1000 - positives, sampled, size=400)
    bounds = [population_count(int(one), sampled, 1000).bounds for one in found]
    assert np.mean([low <= positives <= high for _, low, high in bounds]) > 0.92
    assert all(low <= value <= high for value, low, high in bounds)


@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=20).filter(lambda values: np.std(values) > 1e-6))
def test_the_interval_of_a_mean_agrees_with_scipy(values: list[float]) -> None:
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert mean_interval(values).bounds == pytest.approx((np.mean(values), max(0, low), high))


def test_the_mean_of_one_value_has_no_interval_and_of_none_no_value() -> None:
    assert (mean_interval([3.0]).value, mean_interval([3.0]).low) == (3.0, None)
    assert mean_interval([]).value is None


def test_a_sample_of_all_is_exact_and_of_none_undefined() -> None:
    assert population_count(3, 8, 8).bounds == (3, 3, 3)
    assert population_count(0, 0, 8).value is None
    assert population_count(0, 4, 8).bounds[:2] == (0, 0)


def test_wilson_of_none_or_all_ends_at_0_or_1() -> None:
    assert {wilson(0, trials).low for trials in range(1, 100)} == {0.0}
    assert {wilson(trials, trials).high for trials in range(1, 100)} == {1.0}


def test_wilson_of_no_trials_is_undefined() -> None:
    assert wilson(0, 0) == Estimate(None, None, None, "wilson")


def test_auc_with_ties_agrees_with_sklearn() -> None:
    expected = pytest.approx(roc_auc_score(LABEL, FIRST), abs=1e-12)
    assert auc_interval(LABEL, FIRST).value == expected
    assert validation.auc(LABEL, FIRST) == expected
    assert np.isnan(validation.auc(LABEL, np.where(LABEL, FIRST, np.nan)))


def test_delong_of_a_pair_agrees_with_mlstatkit() -> None:
    z, p_value = Delong_test(LABEL, FIRST, SECOND, return_ci=False, return_auc=False)[:2]
    ours = auc_difference(LABEL, FIRST, SECOND)
    assert ours is not None
    assert ours.p_value == pytest.approx(float(p_value), rel=1e-6)
    aucs, covariance = delong_components(LABEL, np.stack([FIRST, SECOND]))
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert abs(aucs[0] - aucs[1]) / error == pytest.approx(abs(float(z)), rel=1e-6)


def test_delong_interval_agrees_with_its_definition() -> None:
    """The variance written out over all pairs, as DeLong et al. define it."""
    positive, negative = FIRST[LABEL == 1], FIRST[LABEL == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    _, covariance = delong_components(LABEL, FIRST[None])
    assert covariance[0, 0] == pytest.approx(variance, rel=1e-9)


def test_shuffled_labels_leave_the_auc_interval_on_one_half_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(2024)
    covered = 0
    for _ in range(200):
        value, low, high = auc_interval(rng.permutation(LABEL), FIRST).bounds
        assert low <= value <= high
        covered += low <= 0.5 <= high
    # 200 repeats of a true 95 %: 99.9 % of such counts lie between 179 and 199.
    assert 179 <= covered <= 199


@pytest.mark.parametrize("auc", [0.0, 1.0])
def test_perfect_separation_still_has_an_interval(auc: float) -> None:
    label = np.repeat([1, 0], 20)
    score = label if auc else -label
    value, low, high = auc_interval(label, score.astype(float)).bounds
    assert value == auc
    assert 0.1 < high - low < 0.25


@given(st.floats(0, 1), st.integers(1, 500), st.integers(1, 500))
def test_newcombe_interval_holds_its_estimate(auc: float, positives: int, negatives: int) -> None:
    value, low, high = newcombe_auc(auc, positives, negatives).bounds
    assert 0 <= low <= value <= high <= 1
    assert low < high


def test_auc_of_one_class_is_undefined_and_of_two_images_is_not() -> None:
    assert auc_interval(np.ones(5), np.arange(5.0)).value is None
    assert auc_interval(np.array([]), np.array([])).value is None
    assert auc_difference(np.ones(5), np.arange(5.0), np.arange(5.0)) is None
    value, low, high = auc_interval(np.array([1, 0]), np.array([0.3, 0.1])).bounds
    assert (value, high) == (1.0, 1.0)
    assert low < 0.3


def test_equal_scores_differ_by_nothing() -> None:
    ours = auc_difference(LABEL, FIRST, FIRST)
    assert ours is not None
    assert (ours.value, ours.p_value) == (0.0, 1.0)


def test_mcnemar_agrees_with_the_exact_binomial_test() -> None:
    first, second = RNG.random(200) < 0.8, RNG.random(200) < 0.7
    ours = accuracy_difference(first, second)
    assert ours is not None
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    expected = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert ours.p_value == pytest.approx(expected, rel=1e-9)
    assert ours.value == pytest.approx(first.mean() - second.mean())


def test_without_sources_the_interval_is_agresti_and_mins() -> None:
    """One wins three of six and loses one: a half is added to each, and two to their number."""
    first, second = np.array([1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 0, 1, 1, 0], bool)
    arm = 1.959964 * np.sqrt(3.5 + 1.5 - (3.5 - 1.5) ** 2 / 8) / 8
    for cluster in (None, np.arange(6)):
        ours = accuracy_difference(first, second, cluster)
        assert ours is not None
        assert (ours.low, ours.high) == pytest.approx((2 / 8 - arm, 2 / 8 + arm), abs=1e-6)


def test_accuracy_difference_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(600):
        shared = rng.random(120) < 0.6
        first, second = shared | (rng.random(120) < 0.4), shared | (rng.random(120) < 0.2)
        ours = accuracy_difference(first, second)
        assert ours is not None
        covered += ours.low <= 0.4 * 0.2 <= ours.high
    assert covered / 600 == pytest.approx(0.95, abs=0.03)


def test_accuracy_difference_without_disagreement_or_images() -> None:
    same = accuracy_difference(np.ones(10, bool), np.ones(10, bool))
    assert same is not None
    assert (same.value, same.p_value) == (0.0, 1.0)
    assert same.low < 0 < same.high
    assert accuracy_difference(np.array([], bool), np.array([], bool)) is None


def test_differences_of_images_that_are_alike_are_less_certain() -> None:
    """200 sources with one image, each copied four times: no more is known than from the 200."""
    label, cluster = np.tile([1, 0], 100), np.repeat(np.arange(200), 4)
    rng = np.random.default_rng(5)
    first, second = label + rng.normal(0, 1, 200), label + rng.normal(0, 1.5, 200)
    right = [(score > 0.5) == (label == 1) for score in (first, second)]
    copied = [np.repeat(one, 4) for one in (label, first, second, *right)]
    pairs = (
        (auc_difference(label, first, second), auc_difference(copied[0], copied[1], copied[2], cluster)),
        (accuracy_difference(*right), accuracy_difference(copied[3], copied[4], cluster)),
    )
    for alone, by_source in pairs:
        assert alone is not None
        assert by_source is not None
        assert by_source.value == pytest.approx(alone.value)
        assert by_source.high - by_source.low == pytest.approx(alone.high - alone.low, rel=0.02)
        assert by_source.p_value == pytest.approx(alone.p_value, rel=0.05)


def test_clustered_test_of_accuracy_is_right_as_often_as_it_says() -> None:
    """Two equally good models, of which each source favours one: 5 % of the tests say that they differ, or fewer."""
    rng = np.random.default_rng(6)
    cluster, wrong, images = np.repeat(np.arange(30), 8), 0, 0
    for _ in range(400):
        favours = np.repeat(rng.random(30) < 0.5, 8)
        first, second = (rng.random(240) < np.where(favours == side, 0.9, 0.6) for side in (True, False))
        clustered, alone = accuracy_difference(first, second, cluster), accuracy_difference(first, second)
        assert clustered is not None
        assert alone is not None
        wrong, images = wrong + (clustered.p_value < 0.05), images + (alone.p_value < 0.05)
        assert clustered.low <= clustered.value <= clustered.high
    assert wrong / 400 <= 0.075 < images / 400


def few_sources(rng: np.random.Generator, real: int, ai: int, each: int = 12) -> tuple[np.ndarray, ...]:
    """Label, score and source of images of so many sources, half of whose variance is between the sources."""
    source = np.repeat(np.arange(real + ai), each)
    label = (source >= real).astype(int)
    score = 1.7 * label + rng.normal(size=real + ai)[source] + rng.normal(size=len(source))
    return label, score, source


@pytest.mark.slow
def test_intervals_of_few_sources_hold_as_often_as_they_say() -> None:
    """Three sources of a class, and of the other three or many: with the normal quantile, or with the variance between
    all sources together, 75 to 85 % hold."""
    rng = np.random.default_rng(8)
    truth, threshold = float(ndtr(1.7 / 2)), 1.0
    for real, ai in ((3, 3), (3, 30), (30, 3)):
        auc, rate = 0.0, 0.0
        for _ in range(300):
            label, score, source = few_sources(rng, real, ai)
            found = auc_interval(label, score, cluster=source)
            assert found.method == "delong, by source"
            auc += found.bounds[1] <= truth <= found.bounds[2]
            alarms = proportion(score[label == 0] > threshold, source[label == 0])
            rate += alarms.bounds[1] <= ndtr(-threshold / 2**0.5) <= alarms.bounds[2]
        assert min(auc, rate) / 300 >= 0.88, (real, ai)


def test_the_variance_by_source_is_obuchowskis() -> None:
    """By hand, from the formula of the paper: sources that hold both classes, one class, and one image."""
    label = np.array([1, 1, 0, 0, 1, 0, 0, 1, 1, 0])
    score = np.array([2.0, 1.5, 1.0, -0.5, 0.2, 0.4, -1.0, 1.1, 0.9, 0.3])
    source = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 4])
    ai, real = score[label == 1], score[label == 0]
    wins = (ai[:, None] > real) + 0.5 * (ai[:, None] == real)
    auc, m, n = wins.mean(), len(ai), len(real)
    over = [(wins.mean(axis=1) - auc)[source[label == 1] == one].sum() for one in range(5)]
    under = [(wins.mean(axis=0) - auc)[source[label == 0] == one].sum() for one in range(5)]
    s10, s01 = 3 / 2 / m * np.square(over).sum(), 4 / 3 / n * np.square(under).sum()  # of 3 and 4 of the sources
    expected = s10 / m + s01 / n + 2 * 5 / 4 * np.dot(over, under) / (m * n)
    found, _ = _clustered(label, _influence(label, score[None])[0], 0.0, source)
    assert found == pytest.approx(expected)


def test_sign_flips_by_hand() -> None:
    """Sources that gain 2, 1 and 1: of the 8 ways to flip their signs, 4 and -4 are as far from 0."""
    first = np.array([1, 1, 1, 1, 0], bool)
    found = accuracy_difference(first, np.zeros(5, bool), np.array([0, 0, 1, 2, 3]))
    assert found is not None
    assert found.p_value == pytest.approx(2 / 8)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_friedman_approaches_chi_square_with_many_blocks() -> None:
    values = RNG.normal(size=(40, 3)) + np.array([0.0, 0.2, 0.35])
    expected = stats.friedmanchisquare(*values.T).pvalue
    assert friedman(values) == pytest.approx(expected, abs=0.02)


def test_friedman_counts_permutations_where_chi_square_fails() -> None:
    """Two blocks ranked alike: 6 of the 36 orders are as extreme, so p is 1/6 and not chi-square's 0.14."""
    assert friedman(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])) == pytest.approx(1 / 6, abs=0.01)


def test_friedman_needs_two_blocks_and_three_models() -> None:
    assert friedman(np.ones((1, 3))) is None
    assert friedman(np.ones((5, 2))) is None


def test_rare_ai_makes_most_alarms_false() -> None:
    recall, alarms = Estimate(0.9, 0.85, 0.95, ""), Estimate(0.05, 0.03, 0.08, "")
    value, low, high = precision_at(0.01, recall, alarms).bounds
    assert 1 - value == pytest.approx(0.846, abs=0.001)
    assert low == pytest.approx(0.01 * 0.85 / (0.01 * 0.85 + 0.99 * 0.08))
    assert high == pytest.approx(0.01 * 0.95 / (0.01 * 0.95 + 0.99 * 0.03))


def test_precision_without_any_alarm_is_undefined() -> None:
    assert precision_at(0.01, Estimate(0.0, 0.0, 0.1, ""), Estimate(0.0, 0.0, 0.1, "")).value is None


@given(st.integers(0, 60), st.integers(0, 60))
def test_mean_of_rates_stays_between_its_bounds(first: int, second: int) -> None:
    value, low, high = mean_of_rates(wilson(first, 60), wilson(second, 60)).bounds
    assert low + 1e-12 >= 0
    assert low <= value <= high
    assert high <= 1 + 1e-12


@pytest.mark.parametrize("shape", [(30, 200), (200, 30), (2, 5), (1, 4)])
def test_principal_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(5, 1, shape).astype(np.float32) ** 3
    components, share = principal_components(features)
    left, singular, _ = np.linalg.svd(features - features.mean(axis=0, dtype=np.float64), full_matrices=False)
    assert components.shape == left.shape
    assert share == pytest.approx(singular**2 / max((singular**2).sum(), 1e-300), abs=1e-9)
    assert np.abs(components[:, :2]) == pytest.approx(np.abs(left * singular)[:, :2], abs=1e-4)
