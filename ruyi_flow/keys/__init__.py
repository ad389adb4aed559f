"""The keys of a deployment: a private CA, and certificates of nodes and users."""
