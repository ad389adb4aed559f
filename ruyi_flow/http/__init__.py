"""An HTTP server in front of a topology: the API of OpenAI, health and metrics."""
