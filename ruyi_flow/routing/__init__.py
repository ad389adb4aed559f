"""When to stop: confidence scores in, decision out."""
