"""Hostile files by the thousand; see __main__.py."""
