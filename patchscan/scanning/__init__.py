"""Scan a bucket or folder: exactly one row for each object, resumable, incremental. Imports no torch."""
