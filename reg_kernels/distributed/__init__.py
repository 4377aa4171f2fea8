"""What training on several ranks of `torch.distributed` needs beside the layers and optimizers."""

from ._shard import batch, part, shard, unshard, whole

__all__ = ["batch", "part", "shard", "unshard", "whole"]
