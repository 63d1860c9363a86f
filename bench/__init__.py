"""The speed of everything, measured side by side: `make bench`, `make bench-quick`, or `python -m bench --help`."""
