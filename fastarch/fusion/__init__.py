"""How fastarch.fuse converts a model: `swaps` layer by layer, `chains` across layers, over what `tracing` proves."""
