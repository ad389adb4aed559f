"""What a process counts and traces: metrics for Prometheus, spans for OpenTelemetry and Chrome traces."""
