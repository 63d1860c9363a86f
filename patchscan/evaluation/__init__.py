"""Evaluate detectors: metrics with intervals, comparisons, calibration, robustness, explanations and reports."""
