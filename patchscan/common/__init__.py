"""Errors, atomic files, retries, processes, progress and tokens, for all other packages. Imports none of them."""
