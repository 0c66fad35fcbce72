"""graph + Delta -> rewritten graph."""
