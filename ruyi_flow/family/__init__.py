"""Familial models: their geometry, layers, files, tokenizer, and the local store."""
