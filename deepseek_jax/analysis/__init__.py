"""Exact counts, routing statistics, n-gram baselines, plots."""
