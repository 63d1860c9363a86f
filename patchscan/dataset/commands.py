"""The command line of data sets: index one, audit it, build its matched version."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

    from patchscan.dataset.audit import Audit
    from patchscan.reporting.statistics import Estimate

DATA = Annotated[
    str, typer.Argument(help="Folder or s3:// URL in GenImage's layout: <generator>/{train,val}/{ai,nature}.")
]
INDEX = Annotated[Path | None, typer.Option(help="Index file, where it is not DATA/index.parquet.")]
WORKERS = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")]


def add_to(app: typer.Typer) -> None:
    """Register this package's commands."""
    for command in (index, audit, match):
        app.command(rich_help_panel="Data")(command)


def index(
    data: DATA,
    out: Annotated[
        Path | None, typer.Option(help="Index file to write, where DATA cannot be written to or is a bucket.")
    ] = None,
    workers: WORKERS = None,
) -> None:
    """Decode every image once and write index.parquet; quarantine what cannot be read; find duplicates.

    Beside the index appear quarantine.parquet (path, code, message) and duplicates.parquet. StoppedError, the same
    command goes on where it stopped; later it reads only files that are new or changed.

    \b
    Examples:
      patchscan index /data/genimage
      patchscan index /read-only/genimage --out build/genimage/index.parquet --workers 16
      patchscan index s3://images/genimage --out build/genimage/index.parquet --workers 16
    """
    from patchscan.dataset.duplicates import describe
    from patchscan.dataset.index import build_index

    built = build_index(data, out, workers)
    typer.echo(_counts(built.table).to_string())
    typer.echo(f"quarantined: {len(built.quarantine):,}")
    for code, files in built.quarantine.groupby("code"):
        typer.echo(f"  {code}: {len(files):,}, such as {files['path'].iloc[0]}")
    for line in describe(built.duplicates):
        typer.echo(line)
    typer.echo(f"index: {built.path} ({built.read:,} files read in {built.seconds:.0f} s)")


def audit(
    data: DATA,
    index: INDEX = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Ask whether AI and real can be told apart without looking at a pixel, generator by generator.

    AUC 0.5 is chance. `storage` is format, size, JPEG quality and chroma subsampling; `all` adds the bytes. Fair data
    stay near 0.5 in both.

    \b
    Examples:
      patchscan audit /data/genimage
      patchscan audit /data/genimage --out build/audit.json
    """
    from patchscan.dataset.audit import audit as audit_index
    from patchscan.dataset.index import load_index
    from patchscan.reporting.pages import write_json

    found = audit_index(load_index(data, index))
    typer.echo(_audit_table(found).to_string(index=False))
    for warning in found.warnings:
        typer.echo(f"\n{warning}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found.as_dict())
        typer.echo(f"\nfigures: {out}")


def _audit_table(found: "Audit") -> "pd.DataFrame":
    import pandas as pd

    rows = [
        {
            "generator": one.generator,
            "AI": one.ai,
            "real": one.real,
            "AUC storage": _interval(one.storage),
            "AUC all": _interval(one.everything),
            "verdict": one.verdict.upper() if one.verdict == "biased" else one.verdict,
        }
        for one in found.generators
    ]
    return pd.DataFrame(rows)


def _interval(auc: "Estimate") -> str:
    return "-" if auc.value is None else f"{auc.value:.2f} [{auc.low:.2f}, {auc.high:.2f}]"


def match(
    data: DATA,
    out: Annotated[Path, typer.Argument(help="Folder for the matched version, outside DATA.")],
    size: Annotated[int, typer.Option(min=32, help="Side of the crops in pixels; smaller images are left out.")] = 256,
    min_quality: Annotated[int, typer.Option(min=1, max=100, help="Least JPEG quality of the crops.")] = 85,
    max_quality: Annotated[int, typer.Option(min=1, max=100, help="Greatest JPEG quality of the crops.")] = 98,
    seed: Annotated[int, typer.Option(help="Which images, crops and qualities are drawn.")] = 0,
    index: INDEX = None,
    workers: WORKERS = None,
) -> None:
    """Build the fair version of a data set: crops at native resolution, both classes encoded alike and balanced.

    OUT is again in GenImage's layout and indexed; crops.parquet says where each crop came from, left_out.parquet what
    was not used and why. StoppedError, the same command goes on where it stopped.

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
    typer.echo(_counts(matched.index.table).to_string())
    for reason, rows in matched.left_out.groupby("reason"):
        typer.echo(f"left out, {reason}: {len(rows):,}")
    typer.echo(f"matched: {out}; next: patchscan audit {out}")


def _counts(index: "pd.DataFrame") -> "pd.DataFrame":
    return index.groupby(["generator", "split", "class"]).size().unstack(fill_value=0)
