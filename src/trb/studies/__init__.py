"""Runs, comparisons, probes, studies and sweeps: recipes in, findings out; the statistics too.

Training itself is `trb.training`, grading `trb.tasks`, drawing `trb.report`.
"""
