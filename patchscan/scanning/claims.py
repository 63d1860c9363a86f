"""Summarize what the scored files say about their origin: how many say something, in which folders, and where the
detector's verdict is the opposite. The claims themselves are read in provenance.py and detector/watermark.py."""

from typing import Any

from patchscan.scanning.summary import BY_VERDICT, EXAMPLES, WATERMARK, folder_name, largest_groups
from patchscan.scanning.table import ScanTable
from patchscan.scanning.trust import trust_digest

# Terms of https://cv.iptc.org/newscodes/digitalsourcetype for a picture that a camera or a scanner took, and for one
# that a generator made as a whole.
CAPTURED = ("digitalCapture", "computationalCapture", "negativeFilm", "positiveFilm", "print")
GENERATED = "trainedAlgorithmicMedia"

TERM = "provenance.digital_source_type"
IS_SIGNED = "coalesce(provenance.c2pa IN ('Trusted', 'Valid'), false)"
HAS_WATERMARK = f"{WATERMARK} IS NOT NULL"
# The signed word counts more than a text or a watermark that anybody can write.
SAYS = (
    f"CASE WHEN {IS_SIGNED} AND {TERM} IN {CAPTURED} THEN 'camera'"
    f" WHEN {TERM} = '{GENERATED}' OR provenance.generator IS NOT NULL OR {HAS_WATERMARK} THEN 'generator'"
    f" WHEN {TERM} IN {CAPTURED} THEN 'camera' END"
)
SIGNER = "CASE provenance.c2pa WHEN 'Trusted' THEN 'trusted' WHEN 'Valid' THEN 'unknown' ELSE 'nobody' END"
CLAIMS = {
    "images": "true",
    "trusted": "provenance.c2pa = 'Trusted'",
    "valid": "provenance.c2pa = 'Valid'",
    "invalid": "provenance.c2pa IN ('Invalid', 'unreadable')",
    "source_type": f"{TERM} IS NOT NULL",
    "generator_text": "provenance.generator IS NOT NULL",
    "watermark": HAS_WATERMARK,
    "nothing": f"provenance IS NULL AND NOT {HAS_WATERMARK}",
    "says_generator": f"{SAYS} = 'generator'",
    "says_camera": f"{SAYS} = 'camera'",
}
COUNTS = ", ".join(f"count(*) FILTER ({claim}) AS {name}" for name, claim in CLAIMS.items())


def what_files_say(table: ScanTable, base: str, earlier: ScanTable | None = None) -> dict[str, Any]:
    """The section of report.json about the scored files, those carried over included.

    `counts`: how many make each claim (`now`), and in the earlier scan's table `before`, None where there is none.
    `same_list`: whether the earlier scan judged signers by the same list of authorities. `other_list`: files with a
    manifest that was judged by another list than this scan's. `not_searched`: images whose pixels were not searched for
    a watermark, since an older version scored them. `by_folder`: the counts by the first folder below `base`.
    `against_verdicts`: see `_against_verdicts`.
    """
    plan, counts = table.plan, f"SELECT {COUNTS} FROM rows WHERE status = 'scored'"
    now = table.query_one(counts)
    then = earlier.query_one(counts) if earlier else dict.fromkeys(now)
    folders = f"SELECT {folder_name(base)} AS name, {COUNTS} FROM rows WHERE status = 'scored' GROUP BY name"
    return {
        "counts": [{"claim": claim, "now": now[claim], "before": then[claim]} for claim in CLAIMS],
        "same_list": earlier.plan.c2pa_trust == plan.c2pa_trust if earlier else None,
        "other_list": table.count(
            "provenance.c2pa IS NOT NULL AND c2pa_trust IS DISTINCT FROM ?", trust_digest(plan.c2pa_trust)
        ),
        "not_searched": table.count("status = 'scored' AND watermark IS NULL"),
        "by_folder": largest_groups(table, f"{folders} ORDER BY images DESC, name"),
        "against_verdicts": _against_verdicts(table),
    }


def _against_verdicts(table: ScanTable) -> list[dict[str, Any]]:
    """The files that say where the whole picture is from: `says` a `camera` or a `generator`, and who signed them,
    `signer` (`trusted`, `unknown`, `nobody`). Of so many `files` the detector calls so many `ai`, `real`, `uncertain`.
    `contradicted`: called AI though said to be of a camera, or real though said to be generated; `examples` are those
    whose scores contradict most."""
    wrong = "verdict = CASE says WHEN 'camera' THEN 'ai' ELSE 'real' END"
    distance = "(CASE says WHEN 'camera' THEN -p_ai ELSE p_ai END, key, version_id)"
    example = (
        "{'key': key, 'version_id': version_id, 'p_ai': p_ai, 'signer': provenance.c2pa_signer,"
        f" 'tool': provenance.c2pa_generator, 'source_type': {TERM}, 'generator': provenance.generator,"
        f" 'watermark': {WATERMARK}}}"
    )
    found = table.query(
        f"SELECT says, signer, count(*) AS files, {BY_VERDICT},"
        f" count(*) FILTER ({wrong}) AS contradicted,"
        f" coalesce(arg_min({example}, {distance}, {EXAMPLES}) FILTER ({wrong}), []) AS examples"
        f" FROM (SELECT *, {SAYS} AS says, {SIGNER} AS signer FROM rows WHERE status = 'scored')"
        " WHERE says IS NOT NULL GROUP BY says, signer"
    )
    order = ("trusted", "unknown", "nobody")
    return sorted(found, key=lambda row: (row["says"], order.index(row["signer"])))
