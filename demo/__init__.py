"""A code-review agent that is killed, comes back, remembers and keeps secrets."""
