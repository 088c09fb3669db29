// From a node's tensors to launches, in memory and in the stream of the runtime.
#include "cuda_node.h"

#include <locale>

#include "cuda_launch.h"

namespace ort {

inline constexpr Function<76, OrtStatus*(OrtAllocator*, void* memory)> AllocatorFree;
inline constexpr Function<77, OrtStatus*(const OrtAllocator*, const OrtMemoryInfo**)> AllocatorGetInfo;
inline constexpr Function<132, void(OrtAllocator*)> ReleaseAllocator;
inline constexpr Function<193, OrtStatus*(const OrtKernelContext*, void** stream)> GetGPUComputeStream;
inline constexpr Function<277, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void** memory)>
    GetScratchBuffer;
inline constexpr Function<278, OrtStatus*(const OrtKernelInfo*, int memory_type, OrtAllocator**)> GetAllocator;

}  // namespace ort

namespace dsmoe {
namespace {

constexpr uintptr_t ALIGNMENT = 16;  // bytes; the kernels were compiled for it

std::shared_ptr<OrtAllocator> device_memory(const OrtApi* api, const OrtKernelInfo* info) {
  OrtAllocator* found = nullptr;
  check(api, ort::GetAllocator(api, info, ort::DEFAULT_MEMORY, &found));
  return {found, [api](OrtAllocator* memory) { ort::ReleaseAllocator(api, memory); }};
}

// Memory for what is put into this call's stream; given back to be used by what comes later in the same stream.
class Scratch {
 public:
  Scratch(const OrtApi* api, OrtAllocator* from, const OrtKernelContext* context, int64_t bytes)
      : api_(api), from_(from) {
    const OrtMemoryInfo* where = nullptr;
    check(api, ort::AllocatorGetInfo(api, from, &where));
    check(api, ort::GetScratchBuffer(api, context, where, static_cast<size_t>(bytes), &memory_));
  }
  ~Scratch() {
    if (OrtStatus* status = ort::AllocatorFree(api_, from_, memory_)) ort::ReleaseStatus(api_, status);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  cuda::Pointer address() const { return reinterpret_cast<cuda::Pointer>(memory_); }

 private:
  const OrtApi* api_;
  OrtAllocator* from_;
  void* memory_ = nullptr;
};

}  // namespace

Key& Key::add(const char* name, const std::string& value) {
  text_ += std::string(" ") + name + "=" + value;
  return *this;
}

Key& Key::add(const char* name, float value) {
  std::ostringstream written;
  written.imbue(std::locale::classic());
  written.precision(9);
  written << value;
  return add(name, written.str());
}

const char* type_name(int element) {
  switch (element) {
    case ort::FLOAT: return "float32";
    case ort::FLOAT16: return "float16";
    case ort::BFLOAT16: return "bfloat16";
    default: return "another";
  }
}

Key routed_key(const char* op, const Routed& routed, const Attributes& attributes) {
  Key key(op);
  key.add("hidden", routed.H).add("width", routed.I).add("experts", routed.E).add("top_k", routed.K);
  key.add("dtype", type_name(routed.element));
  key.add("activation", ACTIVATIONS[static_cast<int>(attributes.activation)]);
  key.add("alpha", attributes.alpha).add("limit", attributes.limit);
  key.add("layout", LAYOUTS[static_cast<int>(attributes.layout)]);
  return key.add("gate_up_bias", routed.gate_up_bias).add("down_bias", routed.down_bias);
}

CudaNode::CudaNode(const OrtApi* api, const OrtKernelInfo* info, const char* op, const std::string& kernels)
    : api_(api), op_(op), memory_(device_memory(api, info)), folder_(cuda::folder(kernels)) {
  cuda::driver();  // where there is none, say so now
}

void CudaNode::launch(const OrtKernelContext* context, const Key& key, int64_t tokens,
                      const std::vector<Buffer>& buffers) const {
  const cuda::Program& program = folder_.program(key.text());
  const cuda::Range& range = cuda::Folder::range(program, tokens);
  if (program.buffers.size() != buffers.size())
    throw std::runtime_error(text("dsmoe::", op_, ": the program has ", program.buffers.size(), " tensors, the node ",
                                  buffers.size()));
  std::vector<cuda::Pointer> places;
  for (const Buffer& buffer : buffers) {
    places.push_back(reinterpret_cast<cuda::Pointer>(buffer.data));
    if (places.back() % ALIGNMENT != 0)
      throw Refusal(text("dsmoe::", op_, ": ", buffer.name, " begins at ", buffer.data, ", which is no multiple of ",
                         ALIGNMENT, " bytes; bind a copy of it"));
  }
  const std::vector<int64_t> begins = cuda::laid_out(range, tokens);
  const Scratch scratch(api_, memory_.get(), context, begins.back());
  for (size_t i = 0; i < range.rooms.size(); ++i) places.push_back(scratch.address() + begins[i]);
  cuda::launch(folder_, range, tokens, places, stream(context));
}

void CudaNode::copy(const OrtKernelContext* context, const void* from, void* to, int64_t bytes) const {
  const auto place = [](const void* memory) { return reinterpret_cast<cuda::Pointer>(memory); };
  cuda::check(cuda::driver().cuMemcpyDtoDAsync_v2(place(to), place(from), static_cast<size_t>(bytes), stream(context)),
              "copying within the GPU's memory");
}

cuda::Stream CudaNode::stream(const OrtKernelContext* context) const {
  void* found = nullptr;
  check(api_, ort::GetGPUComputeStream(api_, context, &found));
  return static_cast<cuda::Stream>(found);
}

}  // namespace dsmoe
