"""Authenticated encryption: associated data, data keys, and the codec that binds a value to its place."""
