"""The truth: each operation in plain differentiable torch, on any device and in any dtype."""
