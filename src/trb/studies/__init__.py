"""Runs, comparisons, studies and sweeps: recipes in, findings out."""
