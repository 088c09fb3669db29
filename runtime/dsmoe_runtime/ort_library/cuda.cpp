// dsmoe::DsMoE on the CUDA execution provider: kernels that were compiled ahead of time, in the runtime's stream.
#include "cuda.h"

#include <dlfcn.h>

#include <deque>
#include <fstream>

#include "cuda_node.h"

namespace ort {

inline constexpr Function<237, OrtStatus*(const OrtSessionOptions*, const char* key, int* found)> HasSessionConfigEntry;
inline constexpr Function<238, OrtStatus*(const OrtSessionOptions*, const char* key, char* value, size_t* size)>
    GetSessionConfigEntry;

}  // namespace ort

namespace dsmoe {
namespace {

constexpr const char* ENTRY = "dsmoe.kernels";

class CudaKernel {
 public:
  CudaKernel(const OrtApi* api, const OrtKernelInfo* info, int element, const std::string& kernels = {})
      : attributes_(read_attributes(api, info)), element_(element), node_(api, info, "DsMoE", kernels) {}

  const OrtApi* api() const { return node_.api(); }

  void compute(OrtKernelContext* context) const {
    const Call call = read_call(api(), context, attributes_);
    if (call.T == 0) return;
    std::vector<Buffer> buffers;
    for (size_t i = 0; i < INPUTS; ++i) buffers.push_back({INPUT_NAMES[i], call.inputs[i].data});
    buffers.push_back({"y", call.y});
    const bool biases[] = {call.inputs[GATE_UP_BIAS].given, call.inputs[DOWN_BIAS].given};
    const Routed routed{call.H, call.I, call.E, call.K, element_, biases[0], biases[1]};
    node_.launch(context, routed_key("DsMoE", routed, attributes_), call.T, buffers);
  }

 private:
  Attributes attributes_;
  int element_;
  CudaNode node_;
};

}  // namespace

void add_cuda_ops(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels) {
  static std::deque<CudaOperator<CudaKernel>> operators;  // sessions keep pointers to them
  for (const int element : {ort::FLOAT16, ort::BFLOAT16, ort::FLOAT}) {
    operators.emplace_back(element, kernels);
    check(api, ort::CustomOpDomain_Add(api, domain, &operators.back()));
  }
}

std::string kernels_of(const OrtApi* api, const OrtSessionOptions* options) {
  int found = 0;
  check(api, ort::HasSessionConfigEntry(api, options, ENTRY, &found));
  if (found != 0) {
    size_t size = 0;  // with the closing zero
    check(api, ort::GetSessionConfigEntry(api, options, ENTRY, nullptr, &size));
    std::string value(size, '\0');
    check(api, ort::GetSessionConfigEntry(api, options, ENTRY, value.data(), &size));
    return value.c_str();
  }
  Dl_info self{};
  if (dladdr(reinterpret_cast<void*>(&kernels_of), &self) == 0 || self.dli_fname == nullptr)
    throw std::runtime_error("dsmoe::DsMoE: this library does not know where it is");
  const std::string file = self.dli_fname;
  const size_t end = file.rfind('/');
  return (end == std::string::npos ? std::string(".") : file.substr(0, end)) + "/kernels";
}

bool has_kernels(const std::string& kernels) {
  return !kernels.empty() && std::ifstream(kernels + "/programs.txt").good();
}

}  // namespace dsmoe
