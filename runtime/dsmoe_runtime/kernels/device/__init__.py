"""What runs on the GPU: `@triton.jit` functions only, no torch."""
