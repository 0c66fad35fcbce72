"""From a graph node to a kernel: op schemas, eager kernels, and the Inductor lowerings."""
