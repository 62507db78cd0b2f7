"""Judging: pure functions from labels and scores to figures with intervals, and the pages that show them."""
