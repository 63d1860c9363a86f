"""A few hundred of the fuzzer's cases for each place that reads strangers' bytes, always the same ones."""

import io
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from patchscan.detector.signatures import format_of
from tests.fuzz import structures
from tests.fuzz.runner import FINDING, MEGABYTES, outcome_of, outcomes_of_process, peak_megabytes
from tests.fuzz.targets import TARGETS, Target, images
from tests.serving_kit import tar_of, zip_of

CASES = {"decoder": 100, "provenance": 200, "request": 80, "encoding": 30}


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_get_an_answer_within_time_and_memory(name: str, tmp_path: Path) -> None:
    target, outcomes = TARGETS[name](tmp_path), Counter[str]()
    target.run(target.case(random.Random("warm up")))
    before = peak_megabytes()
    for number in range(CASES[name]):
        outcome = outcome_of(target, target.case(random.Random(f"unit {number}")))
        assert not outcome.startswith(FINDING), f"case {number}: {outcome}"
        outcomes[outcome] += 1
    assert peak_megabytes() - before < MEGABYTES
    assert len(outcomes) > 1, "the cases do not reach both answers and refusals"


def test_a_change_along_the_structure_leaves_the_format_and_is_always_the_same() -> None:
    """A mutator that no longer understands its samples would leave them as they are, or only break them."""
    samples = [*images(), zip_of({"a": b"x", "b": b"y"}), tar_of({"a": b"x", "b": b"y"})]
    for sample in samples:
        found = [structures.changed(sample, random.Random(number)) for number in range(15)]
        assert found == [structures.changed(sample, random.Random(number)) for number in range(15)]
        changed = [one for one in found if one != sample]
        assert len(changed) > 10, format_of(sample)
        kept = [one for one in changed if format_of(one) == format_of(sample)]
        assert len(kept) > len(changed) // 2, format_of(sample)


class Slow(Target):
    """A reader whose time grows with nothing."""

    cpu_s, cpu_s_a_megabyte = 0.0, 0.1

    def case(self, draw: random.Random) -> bytes:
        return draw.randbytes(10)

    def run(self, data: bytes) -> str:
        Image.new("RGB", (2000, 2000)).save(io.BytesIO(), "PNG")
        return "read"


def test_the_cases_run_in_a_process_of_their_own() -> None:
    outcomes = outcomes_of_process("provenance", 0, 0, time.monotonic() + 60)
    found = [next(outcomes) for _ in range(3)]
    outcomes.close()
    assert [number for number, _ in found] == [0, 1, 2]
    assert not any(outcome.startswith(FINDING) for _, outcome in found), found


def test_time_is_a_finding() -> None:
    assert outcome_of(Slow(), b"x").startswith(f"{FINDING}: ")
    assert outcome_of(Slow(), bytes(200 * 2**20)) == "read"
