"""The wire: messages, bytes, statuses, and the two ends of a call."""
