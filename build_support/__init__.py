"""What setup.py, the tests and the benchmarks share about building the kernels. Not installed."""
