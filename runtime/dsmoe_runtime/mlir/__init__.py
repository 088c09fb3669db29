"""The CPU road: operators lowered by us to MLIR's scf, memref and vector dialects, compiled by LLVM, run in place."""
