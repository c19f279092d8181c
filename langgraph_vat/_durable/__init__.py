"""The durable tier: every SQL statement, and the schema."""
