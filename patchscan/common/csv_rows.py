"""Read CSV files that people write, or save from a spreadsheet."""

import csv
from collections.abc import Iterable
from itertools import chain


def csv_rows(lines: Iterable[str]) -> "csv.DictReader[str]":
    """Return a reader of the rows by column. Columns are separated by commas; by semicolons or tabs where the first
    line has these and no comma, as spreadsheets save them in many countries. Their names are read in lower case."""
    lines = iter(lines)
    first = next(lines, "")
    delimiter = next((one for one in ",;\t" if one in first), ",")
    reader = csv.DictReader(chain([first], lines), delimiter=delimiter)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    return reader
