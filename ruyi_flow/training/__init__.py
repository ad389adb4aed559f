"""Offline training of a family's branches. No module that serves requests imports this package."""
