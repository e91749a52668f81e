"""Every mechanism in stock PyTorch operators, at its own complexity: for CPUs, other GPUs, float64, or no triton at all."""
