"""Read CSV files that people write, or save from a spreadsheet."""

import codecs
import csv
import io
from collections.abc import Iterable
from itertools import chain


def text_encoding(head: bytes) -> str:
    """Return the encoding of a file that people write, by its first two bytes or more: UTF-16 where it begins with that
    one's byte order mark, as spreadsheets save "Unicode text"; else UTF-8, with or without a mark."""
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded_lines(data: bytes) -> io.StringIO:
    """Return the text of a whole file that people write, for `csv_rows`. Raises UnicodeDecodeError."""
    return io.StringIO(data.decode(text_encoding(data)), newline="")


def csv_rows(lines: Iterable[str]) -> "csv.DictReader[str]":
    """Return a reader of the rows by column. Columns are separated by commas; by semicolons or tabs where the first
    line has these and no comma, as spreadsheets save them in many countries. Their names are read in lower case."""
    lines = iter(lines)
    first = next(lines, "")
    delimiter = next((one for one in ",;\t" if one in first), ",")
    reader = csv.DictReader(chain([first], lines), delimiter=delimiter)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    return reader
