"""Stands before the kernels of this name, which are for GPUs: their import takes seconds."""

raise ImportError("flashinfer is of no use without a GPU")
