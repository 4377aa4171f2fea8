"""A kernel that shows the Philox words of reg_kernels.triton; needs triton."""

import triton
import triton.language as tl

from reg_kernels.triton._random import philox


@triton.jit
def philox_kernel(out_ptr, in_ptr):
    """out int64 [4, 2]: the words of in int64 [key, group, group, offset], for both groups."""
    group = tl.load(in_ptr + 1 + tl.arange(0, 2))
    w0, w1, w2, w3 = philox(tl.load(in_ptr), tl.load(in_ptr + 3), group)
    lane = tl.arange(0, 2)
    tl.store(out_ptr + lane, w0.to(tl.int64))
    tl.store(out_ptr + 2 + lane, w1.to(tl.int64))
    tl.store(out_ptr + 4 + lane, w2.to(tl.int64))
    tl.store(out_ptr + 6 + lane, w3.to(tl.int64))
