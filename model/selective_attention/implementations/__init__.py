"""The same attention three times: as it is defined, in blocks for XLA, and as kernels for TPUs."""
