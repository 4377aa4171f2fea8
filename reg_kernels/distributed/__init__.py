"""What training on several ranks of `torch.distributed` needs beside the layers and optimizers."""

from ._checkpoint import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
