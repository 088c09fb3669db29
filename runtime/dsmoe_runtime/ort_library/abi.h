// The part of ONNX Runtime's C interface that this library uses, declared by us: no header of the runtime is needed.
//
// The runtime hands out a table of function pointers. Its order never changes and it only grows at the end, so a
// function is its place in the table and its signature. `RUNTIME_MINIMUM` is checked when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtApi;  // the table
struct OrtStatus;  // an error; null where all went well
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtMemoryInfo;
struct OrtCustomOp;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null if this runtime is older
  const char* (*GetVersionString)();
};

namespace ort {

inline constexpr uint32_t RUNTIME_MINIMUM = 23;  // onnxruntime 1.23

enum Error : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Element : int { ANY = 0, FLOAT = 1, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum Presence : int { REQUIRED = 0, OPTIONAL = 1 };
enum Memory : int { DEFAULT_MEMORY = 0, HOST_MEMORY = -2 };

// One function of the table: called with the table first, then its own arguments.
template <size_t place, class Signature>
struct Function;

template <size_t place, class Result, class... Arguments>
struct Function<place, Result(Arguments...)> {
  Result operator()(const OrtApi* api, Arguments... arguments) const {
    using Pointer = Result (*)(Arguments...);
    return reinterpret_cast<const Pointer*>(api)[place](arguments...);
  }
};

inline constexpr Function<0, OrtStatus*(int error, const char* message)> CreateStatus;
inline constexpr Function<2, const char*(const OrtStatus*)> GetErrorMessage;
inline constexpr Function<26, OrtStatus*(const char* name, OrtCustomOpDomain** domain)> CreateCustomOpDomain;
inline constexpr Function<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomain_Add;
inline constexpr Function<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain;
inline constexpr Function<51, OrtStatus*(const OrtValue*, void** data)> GetTensorMutableData;
inline constexpr Function<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int* element)> GetTensorElementType;
inline constexpr Function<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* count)> GetDimensionsCount;
inline constexpr Function<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* sizes, size_t count)> GetDimensions;
inline constexpr Function<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)> GetTensorTypeAndShape;
inline constexpr Function<85, OrtStatus*(const OrtKernelInfo*, const char* name, float*)> GetAttribute_float;
inline constexpr Function<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*)> GetAttribute_int64;
inline constexpr Function<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* text, size_t* size)>
    GetAttribute_string;
inline constexpr Function<88, OrtStatus*(const OrtKernelContext*, size_t* count)> GetInputCount;
inline constexpr Function<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue**)> GetInput;
inline constexpr Function<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* sizes, size_t count,
                                         OrtValue**)>
    GetOutput;
inline constexpr Function<93, void(OrtStatus*)> ReleaseStatus;
inline constexpr Function<99, void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo;
inline constexpr Function<274, OrtStatus*(const OrtKernelContext*, void (*task)(void* data, size_t index), size_t tasks,
                                          size_t batches, void* data)>
    ParallelFor;

}  // namespace ort

// What the runtime asks of a custom operator: the whole structure, in the runtime's order.
struct OrtCustomOp {
  uint32_t version;  // of the interface that this structure follows
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);  // null: CreateKernelV2 instead
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);  // null: KernelComputeV2 instead
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208, "the runtime's OrtCustomOp has 208 bytes");
