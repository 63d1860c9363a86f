"""Hostile files by the thousand; see runner.py."""
