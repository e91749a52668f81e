"""Property-based correctness testing of kernels: inputs, tolerance policy, laws."""
