// What the kernels of every provider share: the operator's attributes, its inputs with checked shapes, and errors.
//
// T tokens, H hidden size, E experts, I expert width, K experts per token. Errors are exceptions in here; `guarded`
// turns them into the runtime's status at the border, so that nothing is thrown into code that is not ours.
#pragma once

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "abi.h"

namespace dsmoe {

enum class Activation { silu, silu_clamped, swiglu_oai, gelu, gelu_tanh, relu, relu2 };
enum class Layout { concat, interleaved, concat_transposed, interleaved_transposed, ungated, ungated_transposed };

inline constexpr const char* ACTIVATIONS[] = {
    "silu", "silu_clamped", "swiglu_oai", "gelu", "gelu_tanh", "relu", "relu2"};
inline constexpr const char* LAYOUTS[] = {
    "concat", "interleaved", "concat_transposed", "interleaved_transposed", "ungated", "ungated_transposed"};

// The node's inputs by place.
enum Input : size_t { X, EXPERTS, WEIGHTS, GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS, INPUTS };
inline constexpr const char* INPUT_NAMES[] = {
    "x", "experts", "weights", "gate_up", "down", "gate_up_bias", "down_bias"};

struct Attributes {
  Activation activation = Activation::silu;
  Layout layout = Layout::concat;
  float alpha = 1.0f;
  float limit = 0.0f;

  bool gated() const { return layout != Layout::ungated && layout != Layout::ungated_transposed; }
  bool interleaved() const { return layout == Layout::interleaved || layout == Layout::interleaved_transposed; }
  bool transposed() const {
    return layout == Layout::concat_transposed || layout == Layout::interleaved_transposed ||
           layout == Layout::ungated_transposed;
  }
  int parts() const { return gated() ? 2 : 1; }  // of gate_up
};

// A fault of the model or of what it is fed; any other exception is a fault of ours.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Runs `body`; what it throws comes back as the runtime's status.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Refusal& refusal) {
    return ort::CreateStatus(api, ort::INVALID_ARGUMENT, refusal.what());
  } catch (const std::exception& error) {
    return ort::CreateStatus(api, ort::FAIL, error.what());
  }
}

// Throws if a call of the runtime's failed.
inline void check(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort::GetErrorMessage(api, status);
  ort::ReleaseStatus(api, status);
  throw std::runtime_error("dsmoe::DsMoE: " + message);
}

struct Tensor {
  bool given = false;
  int element = ort::ANY;
  void* data = nullptr;  // may be null where the tensor is empty
  std::vector<int64_t> shape;

  template <class Element>
  Element* as() const {
    return static_cast<Element*>(data);
  }
};

// All tensors of one call, already checked against each other; a bias may be absent.
struct Call {
  Tensor inputs[INPUTS];
  void* y = nullptr;
  int64_t T = 0, H = 0, E = 0, I = 0, K = 0;
};

// What the kernels of other operators read by, too.
std::string shown(const std::vector<int64_t>& shape);
bool read_string(const OrtApi* api, const OrtKernelInfo* info, const char* name, std::string& value);  // is there one?
Tensor read_input(const OrtApi* api, const OrtKernelContext* context, size_t place);  // not `given` where it is absent
void* make_output(const OrtApi* api, OrtKernelContext* context, size_t place, const std::vector<int64_t>& shape);

Attributes read_attributes(const OrtApi* api, const OrtKernelInfo* info);
Call read_call(const OrtApi* api, OrtKernelContext* context, const Attributes& attributes);

// A descriptor of the operator for one provider and one type of x, gate_up and down. `Kernel` is made from
// (const OrtApi*, const OrtKernelInfo*, int element), and has `void compute(OrtKernelContext*)`.
template <class Kernel>
struct Operator : OrtCustomOp {
  const char* provider;
  int element;

  Operator(const char* provider_, int element_) : OrtCustomOp{}, provider(provider_), element(element_) {
    version = ort::RUNTIME_MINIMUM;
    GetName = [](const OrtCustomOp*) { return "DsMoE"; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return INPUTS; };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      return index == EXPERTS ? int{ort::INT64} : index == WEIGHTS ? int{ort::FLOAT} : self(op).element;
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index < GATE_UP_BIAS ? int{ort::REQUIRED} : int{ort::OPTIONAL};
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return int{ort::DEFAULT_MEMORY}; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).element; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return int{ort::REQUIRED}; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(api, [&] { *kernel = new Made{api, Kernel(api, info, self(op).element)}; });
    };
    KernelComputeV2 = [](void* made, OrtKernelContext* context) {
      const auto& self = *static_cast<Made*>(made);
      return guarded(self.api, [&] { self.kernel.compute(context); });
    };
    KernelDestroy = [](void* made) { delete static_cast<Made*>(made); };
  }

 private:
  struct Made {
    const OrtApi* api;
    Kernel kernel;
  };
  static const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }
};

}  // namespace dsmoe
