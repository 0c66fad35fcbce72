"""A GPU's instructions interpreted on a CPU: what Triton compiled for it, run and checked without one.

`text` reads PTX, `machine` runs it for all threads of a grid at once, `instructions`, `arithmetic` and `matrix` are
what it knows, `memory` is where stray and racing accesses show, and `launch` takes the place of Triton's launches.
"""
