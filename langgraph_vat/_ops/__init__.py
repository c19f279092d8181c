"""
What happens, each operation written once.

An operation is a coroutine over the verbs of `_io.protocols`, and awaits
nothing else: it runs on an event loop and without one.
"""
