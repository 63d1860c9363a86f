"""The commands for data sets: `index`, `audit`, `match` and `split`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchscan.common.console import say, say_table

if TYPE_CHECKING:
    import pandas as pd

    from patchscan.dataset.audit import Audit
    from patchscan.reporting.statistics import Estimate

DATA = Annotated[
    str, typer.Argument(help="Folder or s3:// URL in GenImage's layout: <generator>/{train,val}/{ai,nature}.")
]
INDEX = Annotated[
    Path | None, typer.Option(help="Index file; by default DATA/index.parquet, which is built where it is missing.")
]
WORKERS = Annotated[int | None, typer.Option(min=1, help="Files read at once; by default one for each core.")]


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    for command in (index, audit, match, split):
        app.command(rich_help_panel="Data")(command)


def index(
    data: DATA,
    out: Annotated[
        Path | None, typer.Option(help="Index file to write, as for a bucket; by default DATA/index.parquet.")
    ] = None,
    workers: WORKERS = None,
) -> None:
    """Decode every image once and write index.parquet; quarantine what cannot be read; find duplicates.

    Beside the index it writes quarantine.parquet (path, code, message) and duplicates.parquet; for --out sd.parquet,
    sd.quarantine.parquet and sd.duplicates.parquet. An interrupted run continues when the command is run again; later
    runs read only files that are new or changed. Where DATA cannot be written, the index lies in ~/.cache/patchscan,
    and other commands find it there.

    \b
    Examples:
      patchscan index /data/genimage
      patchscan index /read-only/genimage --out build/genimage/index.parquet --workers 16
      patchscan index s3://images/genimage --out build/genimage/index.parquet --workers 16
    """
    from patchscan.dataset.duplicates import describe
    from patchscan.dataset.index import build_index

    built = build_index(data, out, workers)
    say_table(_counts(built.table))
    say(f"quarantined: {len(built.quarantine):,}")
    for code, files in built.quarantine.groupby("code"):
        say(f"  {code}: {len(files):,}, such as {files['path'].iloc[0]}")
    for line in describe(built.duplicates):
        say(line)
    say(f"index: {built.path} ({built.read:,} files read in {built.seconds:.0f} s)")


def audit(
    data: DATA, index: INDEX = None, out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None
) -> None:
    """Measure whether AI and real images differ in how they are stored, generator by generator.

    Shows the AUC of a classifier that sees no pixels: 0.5 is chance, and fair data stay near it. `storage` uses format,
    size, JPEG quality and chroma subsampling; `all` adds the number of bytes.

    \b
    Examples:
      patchscan audit /data/genimage
      patchscan audit /data/genimage --out build/audit.json
    """
    from patchscan.dataset.audit import audit as audit_index
    from patchscan.dataset.index import load_index
    from patchscan.reporting.pages import write_json

    result = audit_index(load_index(data, index))
    say_table(_audit_table(result), index=False)
    for warning in (generator.warning for generator in result.generators if generator.warning):
        say("")
        say(warning)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result.as_dict())
        say("")
        say(f"figures: {out}")


def _audit_table(audit: "Audit") -> "pd.DataFrame":
    import pandas as pd

    rows = [
        {
            "generator": row.generator,
            "AI": row.ai,
            "real": row.real,
            "AUC storage": _format_interval(row.storage),
            "AUC all": _format_interval(row.everything),
            "verdict": row.verdict.upper() if row.verdict == "biased" else row.verdict,
        }
        for row in audit.generators
    ]
    return pd.DataFrame(rows)


def _format_interval(auc: "Estimate") -> str:
    return "-" if auc.value is None else f"{auc.value:.2f} [{auc.low:.2f}, {auc.high:.2f}]"


def match(
    data: DATA,
    out: Annotated[Path, typer.Argument(help="Folder for the matched version, outside DATA.")],
    size: Annotated[int, typer.Option(min=32, help="Side of the crops in pixels; smaller images are left out.")] = 256,
    min_quality: Annotated[int, typer.Option(min=1, max=100, help="Lowest JPEG quality of the crops.")] = 85,
    max_quality: Annotated[int, typer.Option(min=1, max=100, help="Highest JPEG quality of the crops.")] = 98,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of images, crops and qualities.")] = 0,
    index: INDEX = None,
    workers: WORKERS = None,
) -> None:
    """Build the fair version of a data set: crops at native resolution, both classes encoded alike and balanced.

    OUT is again in GenImage's layout and indexed; crops.parquet says where each crop came from, left_out.parquet what
    was not used and why. An interrupted run continues when the command is run again.

    \b
    Examples:
      patchscan match /data/genimage /data/genimage-matched
      patchscan match /data/genimage /data/genimage-matched-128 --size 128 --min-quality 75
    """
    from patchscan.dataset.matched import Settings, build_matched

    if min_quality > max_quality:
        raise typer.BadParameter("--min-quality is greater than --max-quality")
    settings = Settings(size=size, qualities=(min_quality, max_quality), seed=seed)
    matched = build_matched(data, out, settings, index, workers)
    say_table(_counts(matched.index.table))
    for reason, rows in matched.left_out.groupby("reason"):
        say(f"left out, {reason}: {len(rows):,}")
    say(f"matched: {out}; next: patchscan audit {out}")


def split(
    data: Annotated[list[str], typer.Argument(help="Folders or s3:// URLs in GenImage's layout.")],
    out: Annotated[Path, typer.Option(help="Folder for the divided data sets, each in a folder of its own name.")],
    held_out: Annotated[
        float,
        typer.Option(min=0.01, max=0.99, show_default="a third", help="Share of the val images that stays in val."),
    ] = (1 / 3),
    sources: Annotated[
        Path | None, typer.Option(help="CSV with columns file and source, if not DATA/sources.csv or beside DATA.")
    ] = None,
) -> None:
    """Divide val images anew by source, to train on every generator and still measure on sources never seen.

    The others move to train, in copies of the data sets below OUT. Images of one source stay together; so do
    collections of sources, in all data sets alike, unless one has most images of a generator.

    \b
    Examples:
      patchscan split data/genimage --out data/all --held-out 0.2
      patchscan split data/genmix data/genmix-web data/alarms --out data/all
    """
    from patchscan.dataset.split import split as divide

    images = divide(data, out, held_out, sources)
    moved = images[images.before == "val"]
    say_table(moved.groupby(["data", "generator", "class", "after"]).size().unstack(fill_value=0))
    halves = moved.groupby(["data", "generator", "class", "collection"]).after.nunique()
    divided = halves[halves > 1].reset_index()
    if len(divided):
        names = ", ".join(sorted(set(divided.generator)))
        say(f"one collection has most of their images, which were divided by source: {names}")
    say(f"divided: {out}")


def _counts(index: "pd.DataFrame") -> "pd.DataFrame":
    return index.groupby(["generator", "split", "class"]).size().unstack(fill_value=0)
