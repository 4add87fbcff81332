"""Speed beside peers, measured in one run: timing, ops, models, report."""
