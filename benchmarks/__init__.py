"""Speed, memory and fidelity, measured. `python -m benchmarks --help` lists the cases."""
