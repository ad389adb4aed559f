"""The node loop: run the layers, look, decide what is confident, escalate the rest, rewind. No torch, grpc or numpy."""
