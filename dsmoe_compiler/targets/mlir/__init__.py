"""The CPU target through torch-mlir: FX -> torch dialect -> linalg -> loops -> LLVM -> one object file a graph."""
