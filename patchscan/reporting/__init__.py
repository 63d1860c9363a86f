"""What evaluation and scan reports both draw with: statistics with intervals, plots, self-contained HTML pages."""
