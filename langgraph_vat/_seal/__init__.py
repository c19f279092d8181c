"""Authenticated encryption that binds a value to its place."""
