"""A demo of everything on one machine, from sample images to a report: `python -m demo` (`make demo`)."""
