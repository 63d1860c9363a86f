"""Write the page on which a person labels an audit's images: one offline HTML file that asks nothing of the network."""

from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

from patchscan.common.console import ProgressReport, tell
from patchscan.reporting import pages
from patchscan.scanning import thumbnails
from patchscan.scanning.audit_sample import AuditError, Sample
from patchscan.storage.store import Store

# Each may hold an image of 64 megapixels.
READERS = 4


def review_page(sample: Sample, source: Store) -> str:
    """Return the page's HTML. The images are read from `source`, as they were scored; one that has changed since is
    said to be missing. Raises AuditError where all are."""
    with (
        ProgressReport("reading images", len(sample["rows"]), "images") as progress,
        ThreadPoolExecutor(READERS) as pool,
    ):
        reader, images = thumbnails.PictureReader(source), []
        for image in pool.map(lambda row: _image(row, reader), sample["rows"]):
            images.append(image)
            progress.advance(1)
    if missing := sum(image["picture"] is None for image in images):
        lacking = f"{missing:,} of {len(images):,} images drawn are not in {sample['source']} as they were scored"
        if missing == len(images):
            raise AuditError(f"{lacking}: draw them where the scan ran, or scan again")
        tell(f'{lacking}: they can only be labelled "cannot tell"')
    content = {"audit": sample["audit"], "images": images}
    script = files("patchscan.scanning.templates").joinpath("review.js").read_text(encoding="utf-8")
    policy = pages.script_policy(script)
    return pages.render("patchscan.scanning", "review.html", sample, content=content, script=script, policy=policy)


def _image(row: dict[str, Any], reader: thumbnails.PictureReader) -> dict[str, Any]:
    """What the page knows of an image; its name, score and patch are shown only when asked for."""
    found = reader.read(row)
    picture = patch = None
    if found:
        image, turn = found
        small = thumbnails.reduced(image, thumbnails.LARGE)
        # Upright as a viewer shows it: a picture on its side would tell that a camera made it.
        picture = thumbnails.jpeg_uri(small if turn is None else small.transpose(turn))
        patch = thumbnails.jpeg_uri(thumbnails.draw(image, row["patch"]))
    return {
        "number": row["number"],
        "key": row["key"],
        "score": f"P(AI) {row['p_ai']:.3f}, verdict {row['verdict']}",
        "picture": picture,
        "patch": patch,
    }
