"""Scoring buckets: exactly one row an object, resumable, incremental. Imports no torch."""
