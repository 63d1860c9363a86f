"""Whether to trust a detector: per-generator metrics with intervals, comparisons, calibration, reports."""
