"""Training the branches of a family, offline. Nothing that serves imports this package."""
