"""dsmoe::DsMoE for ONNX Runtime: the library for its CPU and CUDA providers, and the kernels that it launches."""
