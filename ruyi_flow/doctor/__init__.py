"""Checks of a machine, a topology, its nodes and links, in words and with a fix for each. Imports no torch."""
