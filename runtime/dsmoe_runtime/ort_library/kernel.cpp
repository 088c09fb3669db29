// Reads the operator's attributes and inputs, and refuses what does not fit, with both values.
#include "kernel.h"

namespace dsmoe {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw Refusal(text("dsmoe::DsMoE: ", parts...));
}

// Whether the runtime's call succeeded; its error is thrown away.
bool succeeded(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return true;
  ort::ReleaseStatus(api, status);
  return false;
}

// The runtime does not say apart what is absent and what has another type; an attribute of another type is refused.
void read_float(const OrtApi* api, const OrtKernelInfo* info, const char* name, float& value) {
  int64_t integer = 0;
  std::string string;
  if (succeeded(api, ort::GetAttribute_float(api, info, name, &value))) return;
  if (succeeded(api, ort::GetAttribute_int64(api, info, name, &integer)) || read_string(api, info, name, string))
    refuse("attribute ", name, " must be a float");
}

template <class Choice, size_t count>
void read_choice(const OrtApi* api, const OrtKernelInfo* info, const char* name, const char* const (&names)[count],
                 Choice& choice) {
  std::string value, wanted;
  int64_t integer = 0;
  float number = 0;
  if (!read_string(api, info, name, value)) {
    if (succeeded(api, ort::GetAttribute_int64(api, info, name, &integer)) ||
        succeeded(api, ort::GetAttribute_float(api, info, name, &number)))
      refuse("attribute ", name, " must be a string");
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    if (value == names[i]) {
      choice = static_cast<Choice>(i);
      return;
    }
    wanted += std::string(i ? ", " : "") + names[i];
  }
  refuse(name, " is '", value, "'; it must be one of ", wanted);
}

Tensor read_tensor(const OrtApi* api, const OrtValue* value) {
  Tensor tensor;
  tensor.given = true;
  check(api, ort::GetTensorMutableData(api, value, &tensor.data));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, ort::GetTensorTypeAndShape(api, value, &info));
  size_t count = 0;
  OrtStatus* status = ort::GetTensorElementType(api, info, &tensor.element);
  if (status == nullptr) status = ort::GetDimensionsCount(api, info, &count);
  tensor.shape.resize(count);
  if (status == nullptr) status = ort::GetDimensions(api, info, tensor.shape.data(), count);
  ort::ReleaseTensorTypeAndShapeInfo(api, info);
  check(api, status);
  return tensor;
}

void want_dimensions(const Tensor* inputs, Input which, size_t wanted) {
  if (inputs[which].shape.size() != wanted)
    refuse(INPUT_NAMES[which], " is ", shown(inputs[which].shape), "; it must have ", wanted, " dimensions");
}

void want_shape(const Tensor* inputs, Input which, const std::vector<int64_t>& wanted, const std::string& by) {
  if (inputs[which].shape != wanted)
    refuse(INPUT_NAMES[which], " is ", shown(inputs[which].shape), "; ", by, " want ", shown(wanted));
}

}  // namespace

std::string shown(const std::vector<int64_t>& shape) {
  std::string all = "[";
  for (const int64_t size : shape) all += (all.size() > 1 ? ", " : "") + std::to_string(size);
  return all + "]";
}

bool read_string(const OrtApi* api, const OrtKernelInfo* info, const char* name, std::string& value) {
  size_t size = 0;  // with the closing zero
  if (!succeeded(api, ort::GetAttribute_string(api, info, name, nullptr, &size))) return false;
  std::string read(size, '\0');
  if (!succeeded(api, ort::GetAttribute_string(api, info, name, read.data(), &size))) return false;
  value = read.c_str();
  return true;
}

Tensor read_input(const OrtApi* api, const OrtKernelContext* context, size_t place) {
  size_t given = 0;
  const OrtValue* value = nullptr;
  check(api, ort::GetInputCount(api, context, &given));
  if (place < given) check(api, ort::GetInput(api, context, place, &value));
  return value == nullptr ? Tensor{} : read_tensor(api, value);
}

void* make_output(const OrtApi* api, OrtKernelContext* context, size_t place, const std::vector<int64_t>& shape) {
  OrtValue* value = nullptr;
  void* data = nullptr;
  check(api, ort::GetOutput(api, context, place, shape.data(), shape.size(), &value));
  if (value == nullptr) refuse("output ", place, " has no name; give it one");
  check(api, ort::GetTensorMutableData(api, value, &data));
  return data;
}

Attributes read_attributes(const OrtApi* api, const OrtKernelInfo* info) {
  Attributes a;
  read_choice(api, info, "activation", ACTIVATIONS, a.activation);
  read_choice(api, info, "layout", LAYOUTS, a.layout);
  read_float(api, info, "alpha", a.alpha);
  read_float(api, info, "limit", a.limit);
  if (!a.gated() && (a.activation == Activation::silu_clamped || a.activation == Activation::swiglu_oai))
    refuse("activation is '", ACTIVATIONS[static_cast<int>(a.activation)], "', which wants gate and up, and layout '",
           LAYOUTS[static_cast<int>(a.layout)], "' has one projection");
  return a;
}

Call read_call(const OrtApi* api, OrtKernelContext* context, const Attributes& attributes) {
  Call call;
  Tensor* inputs = call.inputs;
  for (size_t i = 0; i < INPUTS; ++i) inputs[i] = read_input(api, context, i);
  want_dimensions(inputs, X, 2);
  want_dimensions(inputs, EXPERTS, 2);
  want_dimensions(inputs, GATE_UP, 3);
  want_dimensions(inputs, DOWN, 3);
  call.T = inputs[X].shape[0];
  call.H = inputs[X].shape[1];
  call.E = inputs[GATE_UP].shape[0];
  call.K = inputs[EXPERTS].shape[1];
  const int64_t parts = attributes.parts();
  call.I = inputs[GATE_UP].shape[attributes.transposed() ? 2 : 1] / parts;
  const auto [T, H, E, I, K] = std::tie(call.T, call.H, call.E, call.I, call.K);
  const std::string layout = text("layout '", LAYOUTS[static_cast<int>(attributes.layout)], "'");
  want_shape(inputs, EXPERTS, {T, K}, text("x ", shown(inputs[X].shape)));
  want_shape(inputs, WEIGHTS, {T, K},
             text("x ", shown(inputs[X].shape), " and experts ", shown(inputs[EXPERTS].shape)));
  using Shape = std::vector<int64_t>;
  want_shape(inputs, GATE_UP, attributes.transposed() ? Shape{E, H, parts * I} : Shape{E, parts * I, H},
             text("x ", shown(inputs[X].shape), " and ", layout));
  want_shape(inputs, DOWN, attributes.transposed() ? Shape{E, I, H} : Shape{E, H, I},
             text("gate_up ", shown(inputs[GATE_UP].shape), " and ", layout));
  if (inputs[GATE_UP_BIAS].given)
    want_shape(inputs, GATE_UP_BIAS, {E, parts * I}, text("gate_up ", shown(inputs[GATE_UP].shape), " and ", layout));
  if (inputs[DOWN_BIAS].given)
    want_shape(inputs, DOWN_BIAS, {E, H}, text("down ", shown(inputs[DOWN].shape)));
  call.y = make_output(api, context, 0, inputs[X].shape);
  return call;
}

}  // namespace dsmoe
