"""Whether to trust a detector: the data's bias, metrics with intervals, comparisons, calibration, reports."""
