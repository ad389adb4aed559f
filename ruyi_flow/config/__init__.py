"""Files that people write: YAML in general, topologies and calibrated policies."""
