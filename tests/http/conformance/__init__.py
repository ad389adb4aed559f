"""Requests that fit OpenAI's published schema, and what the server must answer."""
