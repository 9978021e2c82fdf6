"""Toolkit discovery and the CMake build of the kernels, for setup.py, tests and benchmarks. Not installed."""
