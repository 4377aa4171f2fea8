"""What training on several ranks of `torch.distributed` needs beside the layers and optimizers."""

__all__: list[str] = []
