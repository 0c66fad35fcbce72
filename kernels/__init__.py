"""Packed sign planes: their bit layout, the reference semantics of every op, and device code. Imports torch and triton only."""
