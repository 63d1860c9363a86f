"""The command line of scanning."""

import typer


def add_to(app: typer.Typer) -> None:
    """Register this room's commands."""
