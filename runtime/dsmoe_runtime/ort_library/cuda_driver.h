// The part of CUDA's driver interface that this library uses, declared by us. libcuda.so.1 is opened when the first
// node is made, so that the library loads, and registers its operators, on machines without it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsmoe::cuda {

using Result = int;  // 0: all went well
using Pointer = uint64_t;  // device memory
using Context = struct ContextHandle*;
using Module = struct ModuleHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;

// How the copy engine sees a tensor: made by the driver, handed to a kernel by value.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

struct LaunchAttribute {
  int id;
  int padding;
  union {
    int number;
    char room[64];
  } value;
};

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

static_assert(sizeof(TensorMap) == 128 && sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);
static_assert(offsetof(LaunchConfig, stream) == 32 && offsetof(LaunchAttribute, value) == 8);

inline constexpr int SUCCESS = 0;
inline constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;  // a launch's attribute: it may start before its turn
inline constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;  // a device's attributes
inline constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;  // a function's attribute
inline constexpr int PREFER_SHARED = 1;  // a function's cache configuration
inline constexpr int INTERLEAVE_NONE = 0, PROMOTE_TO_128_BYTES = 2, ZEROS_OUTSIDE = 0;  // of a tensor map

struct Driver {
  Result (*cuInit)(unsigned flags);
  Result (*cuGetErrorString)(Result, const char** text);
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxGetDevice)(int* device);
  Result (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  Result (*cuModuleLoadData)(Module*, const void* image);
  Result (*cuModuleGetFunction)(Function*, Module, const char* name);
  Result (*cuFuncSetAttribute)(Function, int attribute, int value);
  Result (*cuFuncSetCacheConfig)(Function, int config);
  Result (*cuLaunchKernelEx)(const LaunchConfig*, Function, void** arguments, void** extra);
  Result (*cuMemcpyDtoDAsync_v2)(Pointer to, Pointer from, size_t bytes, Stream);
  Result (*cuTensorMapEncodeTiled)(TensorMap*, int element, uint32_t rank, void* address, const uint64_t* sizes,
                                   const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                   int interleave, int swizzle, int promotion, int fill);
};

// The functions; throws if there is no driver, or it is too old.
const Driver& driver();

// Throws if a call failed; `what` it was for.
void check(Result result, const char* what);

}  // namespace dsmoe::cuda
