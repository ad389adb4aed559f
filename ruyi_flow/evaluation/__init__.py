"""How good each exit of a family is: benchmarks of lm-evaluation-harness, and agreement with the last exit."""
