"""Clients that were written for OpenAI's server, against this one."""
