"""What else scores images in bulk, for comparison: each module is a program that prints images per second."""

import json

KEY = "images_per_s"


def print_rate(rate: float) -> None:
    """Print the result, as a line that `read_rate` finds between what libraries print."""
    print(json.dumps({KEY: rate}), flush=True)


def read_rate(printed: str) -> float:
    """The rate in what a peer printed."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f'{{"{KEY}"'))
    return float(json.loads(line)[KEY])
