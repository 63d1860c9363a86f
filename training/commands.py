"""The command line of training: index, audit, train, archive."""

import typer


def add_to(app: typer.Typer) -> None:
    """Register this room's commands."""
