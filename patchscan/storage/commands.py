"""The `patchscan copy` command."""

from typing import Annotated

import typer

from patchscan.common.console import say


def add_to(app: typer.Typer) -> None:
    """Register this package's command."""
    app.command(rich_help_panel="Data")(copy)


def copy(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a folder.")],
    destination: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a folder.")],
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip objects that the destination has.")
    ] = False,
) -> None:
    """Copy a folder or bucket prefix, object by object: data to a pod, archives to and from a model store.

    \b
    Examples:
      patchscan copy s3://models/store model_store
      patchscan copy s3://images/genimage /data/genimage --skip-existing
    """
    from patchscan.storage.copying import copy_tree

    say(f"{copy_tree(source, destination, skip_existing):,} copied to {destination}")
