"""How a node runs its stages: caches, attention, sampling."""
