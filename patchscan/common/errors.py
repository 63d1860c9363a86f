"""The base of every error a user can mend. The command line prints such an error as one line."""

# The exit code of work that was told to stop: what is done is kept, and the same command goes on.
EXIT_INTERRUPTED = 75


class UserError(Exception):
    """Something the user must change: a path, an option, a file. The message says what is wrong and what to do;
    `exit_code` is what the command ends with."""

    exit_code = 2
