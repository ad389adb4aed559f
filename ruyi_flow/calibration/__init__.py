"""From recorded traces to thresholds with a bound, offline."""
