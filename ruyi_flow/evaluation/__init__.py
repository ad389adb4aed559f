"""Evaluation of each exit of a family: benchmarks of lm-evaluation-harness, and agreement with the last exit."""
