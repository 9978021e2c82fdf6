"""The definition of every op in plain PyTorch: readable, and what runs where no native kernel does."""
