"""The `patchscan` command: every room's commands under one name. Each command imports what it needs when it runs."""

import sys

import typer

from dataset import commands as dataset_commands
from detector.errors import UserError
from evaluation import commands as evaluation_commands
from handlers import commands as handlers_commands
from scanning import cluster_commands
from scanning import commands as scanning_commands
from storage import commands as storage_commands
from training import commands as training_commands

app = typer.Typer(
    name="patchscan",
    help="Find the images in a bucket that were made by a generator, and know how far to trust the answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for room in (
    dataset_commands,
    training_commands,
    evaluation_commands,
    handlers_commands,
    scanning_commands,
    cluster_commands,
    storage_commands,
):
    room.add_to(app)


def main() -> None:
    """Run one command; an error the user can mend is one line on standard error and its exit code."""
    try:
        app()
    except UserError as error:
        print(f"patchscan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
