"""The command line of evaluation."""

import typer


def add_to(app: typer.Typer) -> None:
    """Register this room's commands."""
