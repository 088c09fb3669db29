// What the operators on the CUDA execution provider share: keys of programs, a node with its machine code and memory.
#pragma once

#include <memory>

#include "cuda_driver.h"
#include "kernel.h"

struct OrtAllocator;

namespace dsmoe {
namespace cuda {
class Folder;
}

// A program's key, word by word, as `layer.py` writes it.
class Key {
 public:
  explicit Key(const std::string& op) : text_(op) {}
  Key& add(const char* name, const std::string& value);
  Key& add(const char* name, const char* value) { return add(name, std::string(value)); }
  Key& add(const char* name, int64_t value) { return add(name, std::to_string(value)); }
  Key& add(const char* name, bool value) { return add(name, value ? "1" : "0"); }
  Key& add(const char* name, float value);
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

const char* type_name(int element);  // as torch calls it

// What both operators' keys begin with.
struct Routed {
  int64_t H, I, E, K;
  int element;
  bool gate_up_bias, down_bias;
};
Key routed_key(const char* op, const Routed& routed, const Attributes& attributes);

// A tensor of a node; data is null where it is absent.
struct Buffer {
  const char* name;
  const void* data;
};

template <class... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  throw Refusal(text("dsmoe::", op, ": ", parts...));
}

// An attribute that the exporter always writes; `read` is the runtime's function for its type.
template <class Read, class Value>
Value attribute(const OrtApi* api, const OrtKernelInfo* info, const char* op, const Read& read, const char* name,
                Value value) {
  if (OrtStatus* status = read(api, info, name, &value)) {
    ort::ReleaseStatus(api, status);
    refuse(op, "attribute ", name, " is missing, or of another type; export the model again");
  }
  return value;
}

using Shape = std::vector<int64_t>;

// The tensors of one call: the inputs, and as buffers then the outputs, too.
class Tensors {
 public:
  template <size_t count>
  Tensors(const OrtApi* api, OrtKernelContext* context, const char* op, const char* const (&names)[count])
      : api_(api), context_(context), op_(op) {
    for (size_t i = 0; i < count; ++i) {
      inputs_.push_back(read_input(api, context, i));
      buffers_.push_back({names[i], inputs_[i].data});
    }
  }

  const Tensor& operator[](size_t which) const { return inputs_[which]; }
  const Shape& shape(size_t which) const { return inputs_[which].shape; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  std::string said(size_t which) const { return text(buffers_[which].name, " ", shown(shape(which))); }

  void want_dimensions(size_t which, size_t wanted) const {
    if (shape(which).size() != wanted)
      refuse(op_, buffers_[which].name, " is ", shown(shape(which)), "; it must have ", wanted, " dimensions");
  }

  void want_shape(size_t which, const Shape& wanted, const std::string& by) const {
    if (shape(which) != wanted)
      refuse(op_, buffers_[which].name, " is ", shown(shape(which)), "; ", by, " want ", shown(wanted));
  }

  void want_shape_if_given(size_t which, const Shape& wanted, const std::string& by) const {
    if (inputs_[which].given) want_shape(which, wanted, by);
  }

  void* add_output(const char* name, const Shape& shape) {
    void* made = make_output(api_, context_, buffers_.size() - inputs_.size(), shape);
    buffers_.push_back({name, made});
    return made;
  }

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
  const char* op_;
  std::vector<Tensor> inputs_;
  std::vector<Buffer> buffers_;
};

class CudaNode {
 public:
  CudaNode(const OrtApi* api, const OrtKernelInfo* info, const char* op, const std::string& kernels);

  const OrtApi* api() const { return api_; }

  // Puts the kernels of the folder's program into the runtime's stream. buffers: all inputs, then all outputs.
  void launch(const OrtKernelContext* context, const Key& key, int64_t tokens,
              const std::vector<Buffer>& buffers) const;

  // Puts a copy within the device's memory into the runtime's stream.
  void copy(const OrtKernelContext* context, const void* from, void* to, int64_t bytes) const;

 private:
  cuda::Stream stream(const OrtKernelContext* context) const;

  const OrtApi* api_;
  const char* op_;
  std::shared_ptr<OrtAllocator> memory_;  // the device's, that the runtime hands out
  const cuda::Folder& folder_;
};

// A descriptor that knows where its machine code is. `Kernel` is made from (const OrtApi*, const OrtKernelInfo*, int
// element, const std::string& kernels), and has `const OrtApi* api()`.
template <class Kernel>
struct CudaOperator : Operator<Kernel> {
  std::string kernels;

  CudaOperator(int element_, const std::string& kernels_)
      : Operator<Kernel>("CUDAExecutionProvider", element_), kernels(kernels_) {
    this->CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      const auto& self = *static_cast<const CudaOperator*>(op);
      return guarded(api, [&] { *kernel = new Kernel(api, info, self.element, self.kernels); });
    };
    this->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto& self = *static_cast<Kernel*>(kernel);
      return guarded(self.api(), [&] { self.compute(context); });
    };
    this->KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

}  // namespace dsmoe
