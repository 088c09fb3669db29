// Opens libcuda.so.1 and looks up its functions.
#include "cuda_driver.h"

#include <dlfcn.h>

#include "kernel.h"

namespace dsmoe::cuda {
namespace {

template <class Signature>
void find(void* library, const char* name, Signature*& function) {
  function = reinterpret_cast<Signature*>(dlsym(library, name));
  if (function == nullptr)
    throw std::runtime_error(
        text("dsmoe::DsMoE: libcuda.so.1 has no ", name, "; a driver for CUDA 12 or newer is needed"));
}

Driver opened() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(text("dsmoe::DsMoE: no CUDA driver: ", dlerror()));
  Driver made{};
  find(library, "cuInit", made.cuInit);
  find(library, "cuGetErrorString", made.cuGetErrorString);
  find(library, "cuCtxGetCurrent", made.cuCtxGetCurrent);
  find(library, "cuCtxGetDevice", made.cuCtxGetDevice);
  find(library, "cuDeviceGetAttribute", made.cuDeviceGetAttribute);
  find(library, "cuModuleLoadData", made.cuModuleLoadData);
  find(library, "cuModuleGetFunction", made.cuModuleGetFunction);
  find(library, "cuFuncSetAttribute", made.cuFuncSetAttribute);
  find(library, "cuFuncSetCacheConfig", made.cuFuncSetCacheConfig);
  find(library, "cuLaunchKernelEx", made.cuLaunchKernelEx);
  find(library, "cuMemcpyDtoDAsync_v2", made.cuMemcpyDtoDAsync_v2);
  find(library, "cuTensorMapEncodeTiled", made.cuTensorMapEncodeTiled);
  const Result begun = made.cuInit(0);
  if (begun != SUCCESS) throw std::runtime_error(text("dsmoe::DsMoE: cuInit failed with error ", begun));
  return made;
}

}  // namespace

const Driver& driver() {
  static const Driver made = opened();
  return made;
}

void check(Result result, const char* what) {
  if (result == SUCCESS) return;
  const char* words = nullptr;
  if (driver().cuGetErrorString(result, &words) != SUCCESS || words == nullptr) words = "an unknown error";
  throw std::runtime_error(text("dsmoe::DsMoE: ", what, ": ", words, " (CUDA error ", result, ")"));
}

}  // namespace dsmoe::cuda
