"""Shared by all pages: base.html, its style sheet and its script."""
