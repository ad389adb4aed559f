"""The daemon of one node: its engine, the answers to users, the gRPC service, and the supervisor of several nodes."""
