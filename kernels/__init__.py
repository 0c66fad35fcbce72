"""Packed sign planes: bit layout, reference semantics of every op, device code. Imports torch and triton only."""
