"""Measurements against the savers people use today, side by side in one run."""
