// The operator on the CPU execution provider.
#pragma once

#include "abi.h"

namespace dsmoe {

void add_cpu_ops(const OrtApi* api, OrtCustomOpDomain* domain);

}  // namespace dsmoe
