"""Each op in plain PyTorch, on any device and dtype: the readable truth the others are held to."""
