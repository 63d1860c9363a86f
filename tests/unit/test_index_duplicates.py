import shutil
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from patchscan.dataset.duplicates import describe, near_pairs
from patchscan.dataset.index import build_index
from tests.image_tree import picture, write


def test_copies_across_train_and_val_are_reported(tmp_path: Path) -> None:
    gan = tmp_path / "gan"
    for number in range(6):
        write(gan / "train" / "ai" / f"{number}.png", picture(number))
        write(gan / "val" / "nature" / f"{number}.png", picture(100 + number))
    (gan / "val" / "ai").mkdir()
    shutil.copy(gan / "train" / "ai" / "0.png", gan / "val" / "ai" / "same_bytes.png")
    write(gan / "val" / "ai" / "recompressed.jpg", picture(1), quality=80)
    shutil.copy(gan / "train" / "ai" / "2.png", gan / "train" / "ai" / "again.png")
    duplicates = build_index(tmp_path, workers=1).duplicates

    def names(kind: str) -> list[set[str]]:
        rows = duplicates[duplicates["kind"] == kind]
        return [{Path(path).name for path in group["path"]} for _, group in rows.groupby("group")]

    assert names("exact") == [{"0.png", "same_bytes.png"}, {"2.png", "again.png"}]
    assert names("near") == [{"1.png", "recompressed.jpg"}]
    said = "\n".join(describe(duplicates))
    assert "LEAK: 1 val files are identical to train files" in said
    assert "LEAK: 1 val files are nearly identical to train files" in said
    assert "CONTRADICTION" not in said


def test_one_image_in_both_classes_is_called_a_contradiction(tmp_path: Path) -> None:
    for label in ("ai", "nature"):
        write(tmp_path / "gan" / "train" / label / "same.png", picture(0))
    said = "\n".join(describe(build_index(tmp_path, workers=1).duplicates))
    assert "CONTRADICTION: 1 groups of identical files" in said
    assert "LEAK" not in said


def test_without_copies_nothing_is_reported(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "gan" / "train" / "ai" / f"{number}.png", picture(number))
    duplicates = build_index(tmp_path, workers=1).duplicates
    assert len(duplicates) == 0
    assert describe(duplicates) == ["identical files: 0 in 0 groups", "nearly identical files: 0 in 0 groups"]


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=6)), max_size=20),
    st.integers(0, 6),
)
def test_banded_search_finds_exactly_the_near_pairs(
    bases: list[int], flips: list[tuple[int, set[int]]], bits: int
) -> None:
    hashes = bases + [bases[base % len(bases)] ^ sum(1 << bit for bit in flipped) for base, flipped in flips]
    expected = [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (hashes[i] ^ hashes[j]).bit_count() <= bits
    ]
    assert near_pairs(np.array(hashes, dtype=np.uint64), bits).tolist() == [list(pair) for pair in expected]
