"""Each op in Triton, imported at its first call: triton is optional."""
