"""Conformance of savers and stores: LangGraph's own suite, and specs where it is silent."""
