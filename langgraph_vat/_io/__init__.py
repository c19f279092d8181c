"""The verbs that operations may await, and their blocking and asyncio implementations."""
