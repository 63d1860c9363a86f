"""Shared by evaluation and scan reports: statistics with intervals, plots, self-contained HTML pages."""
