"""Find exact and near duplicates in an index: a copy of a training image in the val split inflates every metric."""

from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Images whose 64-bit perceptual hashes differ in at most so many bits are one picture, re-encoded or retouched.
NEAR_BITS = 4
# Rows of hashes compared at once, which bounds memory.
BLOCK = 512


def find_duplicates(index: pd.DataFrame) -> pd.DataFrame:
    """Find every file that has a copy; one row for each: kind (`exact`, equal bytes; `near`, perceptual hashes chained
    by at most NEAR_BITS differing bits), group (a number), path, generator, split, class.

    A near group that holds only exact copies of one file is not repeated as near. Sorted by kind, group, path.
    """
    exact = pd.Series(pd.factorize(index["sha256"])[0], index.index)
    hashes, of_file = np.unique([int(text, 16) for text in index["phash"]], return_inverse=True)
    near = pd.Series(_group_numbers(hashes.astype(np.uint64))[of_file] if len(index) else [], index.index)
    several_files = index.groupby(near)["sha256"].transform("nunique") > 1
    columns = ["path", "generator", "split", "class"]
    found = pd.concat(
        [
            index[columns].assign(kind="exact", group=exact)[exact.duplicated(keep=False)],
            index[columns].assign(kind="near", group=near)[several_files],
        ]
    )
    found["group"] = found.groupby("kind")["group"].transform(lambda group: pd.factorize(group)[0])
    return found[["kind", "group", *columns]].sort_values(["kind", "group", "path"], ignore_index=True)


def describe(duplicates: pd.DataFrame) -> list[str]:
    """Describe the table of `find_duplicates` in sentences: how many copies, and how many across splits or classes."""
    lines = []
    for kind, word in (("exact", "identical"), ("near", "nearly identical")):
        rows = duplicates[duplicates["kind"] == kind]
        groups = rows.groupby("group")
        lines.append(f"{word} files: {len(rows):,} in {groups.ngroups:,} groups")
        leaked = rows[(rows["split"] == "val") & (groups["split"].transform("nunique") > 1)]
        if len(leaked):
            lines.append(f"LEAK: {len(leaked):,} val files are {word} to train files; results on them are too good")
        contradicting = int((groups["class"].nunique() > 1).sum())
        if contradicting:
            lines.append(f"CONTRADICTION: {contradicting:,} groups of {word} files hold both ai and nature")
    return lines


def _group_numbers(hashes: np.ndarray) -> np.ndarray:
    """Return a group number for each distinct hash (uint64, n): the connected components of those that are near."""
    pairs = near_pairs(hashes, NEAR_BITS)
    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(hashes), len(hashes)))
    return connected_components(edges, directed=False)[1]


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Return all pairs i < j of `hashes` (uint64, n) at most `bits` bits apart, int (m, 2), sorted.

    Cut into `bits` + 1 bands, two such hashes agree in at least one whole band (pigeonhole), so only hashes that share
    a band are compared.
    """
    edges = np.linspace(0, 64, bits + 2).astype(int)
    found = [np.empty((0, 2), dtype=np.int64)]
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            found += [_compare(hashes, bucket, bits)] if len(bucket) > 1 else []
    return np.unique(np.concatenate(found), axis=0)


def _compare(hashes: np.ndarray, bucket: np.ndarray, bits: int) -> np.ndarray:
    """The near pairs within one bucket (indices into `hashes`), int (m, 2); in blocks, as a bucket may be large."""
    bucket = np.sort(bucket)
    found = []
    for start in range(0, len(bucket), BLOCK):
        block = bucket[start : start + BLOCK]
        distance = np.bitwise_count(hashes[block][:, None] ^ hashes[bucket][None, :])
        first, second = np.nonzero(distance <= bits)
        ordered = block[first] < bucket[second]
        found.append(np.stack([block[first[ordered]], bucket[second[ordered]]], axis=1))
    return np.concatenate(found)
