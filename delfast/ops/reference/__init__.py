"""The definition of every op in plain PyTorch, which also runs on devices without native kernels."""
