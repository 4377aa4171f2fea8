"""Each op in Triton. Imported by reg_kernels.ops at an op's first call, since triton is optional."""
