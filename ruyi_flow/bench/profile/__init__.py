"""Measurement of profiles for the simulator: stages in this process, node processes, running nodes, links."""
