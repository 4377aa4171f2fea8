"""What `train`, `compare` and `tune` train: nets, the kernels they train with, and the loop."""
