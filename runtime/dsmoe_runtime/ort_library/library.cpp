// The library's one entry: ONNX Runtime calls it with the options of a session, and it adds our operators.
#include <map>
#include <mutex>

#include "cpu_kernel.h"
#include "cuda.h"
#include "kernel.h"

namespace dsmoe {
namespace {

// One for all sessions that take machine code from the same folder. Sessions point to it for as long as they live.
OrtCustomOpDomain* domain(const OrtApi* api, const std::string& kernels) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<std::string, bool>, OrtCustomOpDomain*> made;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const bool there = has_kernels(kernels);
  const auto found = made.find({kernels, there});
  if (found != made.end()) return found->second;
  OrtCustomOpDomain* fresh = nullptr;
  check(api, ort::CreateCustomOpDomain(api, "dsmoe", &fresh));
  add_cpu_ops(api, fresh);
  add_cuda_ops(api, fresh, kernels);
  if (there) {
    add_cuda_layer_ops(api, fresh, kernels);
    add_cuda_decode_ops(api, fresh, kernels);
  }
  return made[{kernels, there}] = fresh;
}

}  // namespace
}  // namespace dsmoe

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ort::RUNTIME_MINIMUM);
  if (api == nullptr) {  // what the first release had is enough to say so
    const std::string message = dsmoe::text("dsmoe::DsMoE wants onnxruntime 1.", ort::RUNTIME_MINIMUM,
                                            " or newer, and this is ", base->GetVersionString());
    return ort::CreateStatus(base->GetApi(1), ort::FAIL, message.c_str());
  }
  return dsmoe::guarded(api, [&] {
    OrtCustomOpDomain* domain = dsmoe::domain(api, dsmoe::kernels_of(api, options));
    dsmoe::check(api, ort::AddCustomOpDomain(api, options, domain));
  });
}
