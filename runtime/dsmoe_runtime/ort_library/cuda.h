// The operators on the CUDA execution provider.
#pragma once

#include <string>

#include "abi.h"

namespace dsmoe {

// dsmoe::DsMoE. kernels: the folder with machine code, looked at when a node is made.
void add_cuda_ops(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels);

// dsmoe::DsMoELayer, which no other provider has: the runtime runs the body of a node's function where the operator is
// not registered, and refuses the node where it is registered for another provider. So only where there are kernels.
void add_cuda_layer_ops(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels);

// dsmoe::DsGemv and dsmoe::DsDecodeAttention: one token of one sequence. No other provider has them, and they have no
// body.
void add_cuda_decode_ops(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels);

// What the session's config entry `dsmoe.kernels` says, else the folder `kernels` beside this library.
std::string kernels_of(const OrtApi* api, const OrtSessionOptions* options);

// Whether there is such a folder with programs in it.
bool has_kernels(const std::string& kernels);

}  // namespace dsmoe
