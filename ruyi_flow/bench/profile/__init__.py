"""Profiles for the simulator: what stages take on this machine, what is around steps, running nodes, links."""
