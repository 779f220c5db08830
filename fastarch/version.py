__version__ = "0.1.0"
TORCH = "2.11", "2.15"  # from, and below: what is tested; pyproject.toml asks pip for the same
TRITON = "3.6"  # the one of torch 2.11, and of the only GPU that kernels ran on; each torch brings its own
