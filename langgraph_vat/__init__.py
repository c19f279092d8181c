"""Checkpointer and store for LangGraph: hot, durable, remembered, sealed."""
