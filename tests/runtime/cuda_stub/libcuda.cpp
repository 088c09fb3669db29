// A CUDA driver without a GPU: it prints what it is asked for. Built as libcuda.so.1 for tests of the launches.
//
// STUB_ARGUMENTS: how many arguments each launch has, in their order. STUB_CAPABILITY: 90 unless it says otherwise.
// Of an argument 8 bytes are printed; a tensor map's first 8 bytes are its number.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

#include "cuda_driver.h"

using dsmoe::cuda::Context;
using dsmoe::cuda::Function;
using dsmoe::cuda::LaunchConfig;
using dsmoe::cuda::Module;
using dsmoe::cuda::Pointer;
using dsmoe::cuda::Stream;
using dsmoe::cuda::TensorMap;

namespace {

int capability() {
  const char* said = std::getenv("STUB_CAPABILITY");
  return said == nullptr ? 90 : std::atoi(said);
}

int next_count() {
  static std::istringstream counts(std::getenv("STUB_ARGUMENTS") ? std::getenv("STUB_ARGUMENTS") : "");
  int count = 0;
  counts >> count;
  return count;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }

int cuGetErrorString(int, const char** text) {
  *text = "the stub's error";
  return 0;
}

int cuCtxGetCurrent(Context* context) {
  *context = reinterpret_cast<Context>(1);
  return 0;
}

int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? capability() / 10 : capability() % 10;
  return 0;
}

int cuModuleLoadData(Module* module, const void* image) {
  *module = reinterpret_cast<Module>(1);
  return std::memcmp(image, "\x7f" "ELF", 4) == 0 ? 0 : 200;
}

int cuModuleGetFunction(Function* function, Module, const char* name) {
  *function = reinterpret_cast<Function>(strdup(name));
  return 0;
}

int cuFuncSetCacheConfig(Function, int) { return 0; }

int cuFuncSetAttribute(Function function, int attribute, int value) {
  std::printf("attribute %s %d %d\n", reinterpret_cast<char*>(function), attribute, value);
  return 0;
}

int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, Stream stream) {
  std::printf("copy %" PRIu64 " %" PRIu64 " %zu %" PRIu64 "\n", to, from, bytes, reinterpret_cast<uint64_t>(stream));
  return 0;
}

int cuTensorMapEncodeTiled(TensorMap* made, int element, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t*, int, int swizzle, int, int) {
  static uint64_t number = 0;
  std::memset(made, 0, sizeof *made);
  made->opaque[0] = ++number;
  std::printf("map %" PRIu64 " %d %d %" PRIu64, number, element, swizzle, reinterpret_cast<uint64_t>(address));
  for (uint32_t i = 0; i < rank; ++i) std::printf(" %" PRIu64, sizes[i]);
  for (uint32_t i = 0; i + 1 < rank; ++i) std::printf(" %" PRIu64, strides[i]);
  for (uint32_t i = 0; i < rank; ++i) std::printf(" %u", box[i]);
  std::printf("\n");
  return 0;
}

int cuLaunchKernelEx(const LaunchConfig* config, Function function, void** arguments, void**) {
  std::printf("launch %s %u %u %u %u %u %d %" PRIu64, reinterpret_cast<char*>(function), config->grid[0],
              config->grid[1], config->grid[2], config->block[0], config->shared_bytes,
              config->attribute_count == 1 && config->attributes[0].id == 6 && config->attributes[0].value.number == 1,
              reinterpret_cast<uint64_t>(config->stream));
  for (int i = 0, count = next_count(); i < count; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, arguments[i], sizeof value);
    std::printf(" %" PRIu64, value);
  }
  std::printf("\n");
  return 0;
}

}  // extern "C"
