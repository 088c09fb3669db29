// One call of the operator on a GPU: workspace, arguments, launches. Nothing waits for the GPU.
#pragma once

#include "cuda_folder.h"

namespace dsmoe::cuda {

// Where each room begins in one allocation, and at the end how large that is; in bytes.
std::vector<int64_t> laid_out(const Range& range, int64_t tokens);

// Puts a range's kernels into the stream. buffers: the node's inputs (0 where absent) and outputs, then each room.
void launch(const Folder& folder, const Range& range, int64_t tokens, const std::vector<Pointer>& buffers,
            Stream stream);

}  // namespace dsmoe::cuda
