// dsmoe::DsMoELayer on the CUDA execution provider: gate, routed and shared experts in the launches of one program.
//
// T tokens, H hidden size, E experts, I expert width, K experts per token, S shared width.
#include <deque>

#include "cuda.h"
#include "cuda_node.h"

namespace dsmoe {
namespace {

constexpr const char* OP = "DsMoELayer";

// The node's inputs and outputs by place.
enum Place : size_t {
  TOKENS, ROUTER_WEIGHT, ROUTER_BIAS, SELECTION_BIAS, ALL_GATE_UP, ALL_DOWN, ALL_GATE_UP_BIAS, ALL_DOWN_BIAS,
  SHARED_GATE_UP, SHARED_DOWN, PLACES
};
constexpr const char* NAMES[] = {
    "x", "router_weight", "router_bias", "selection_bias", "gate_up", "down", "gate_up_bias", "down_bias",
    "shared_gate_up", "shared_down"};
enum Answer : size_t { Y, CHOSEN, ANSWERS };

// The gate's attributes; the key's words say what they may be.
struct Gate {
  int64_t top_k = 0, n_group = 0, topk_group = 0, renormalize = 0;
  float eps = 0, scale = 0;
  std::string score, group_score, router_dtype;
};

Gate read_gate(const OrtApi* api, const OrtKernelInfo* info) {
  Gate gate;
  const auto want_integer = [&](const char* name, int64_t& value) {
    value = attribute(api, info, OP, ort::GetAttribute_int64, name, value);
  };
  const auto want_float = [&](const char* name, float& value) {
    value = attribute(api, info, OP, ort::GetAttribute_float, name, value);
  };
  const auto want_string = [&](const char* name, std::string& value) {
    if (!read_string(api, info, name, value))
      refuse(OP, "attribute ", name, " is missing, or of another type; export the model again");
  };
  want_integer("top_k", gate.top_k);
  want_string("score", gate.score);
  want_integer("n_group", gate.n_group);
  want_integer("topk_group", gate.topk_group);
  want_string("group_score", gate.group_score);
  want_integer("renormalize", gate.renormalize);
  want_float("eps", gate.eps);
  want_float("scale", gate.scale);
  want_string("router_dtype", gate.router_dtype);
  return gate;
}

// All tensors of one call, already checked against each other.
struct LayerCall {
  Tensor inputs[PLACES];
  int64_t T = 0, H = 0, E = 0, I = 0, S = 0;

  void want_dimensions(Place which, size_t wanted) const {
    if (inputs[which].shape.size() != wanted)
      refuse(OP, NAMES[which], " is ", shown(inputs[which].shape), "; it must have ", wanted, " dimensions");
  }

  void want_shape(Place which, const std::vector<int64_t>& wanted, const std::string& by) const {
    if (inputs[which].given && inputs[which].shape != wanted)
      refuse(OP, NAMES[which], " is ", shown(inputs[which].shape), "; ", by, " want ", shown(wanted));
  }

  std::string said(Place which) const { return text(NAMES[which], " ", shown(inputs[which].shape)); }
};

LayerCall read_layer_call(const OrtApi* api, OrtKernelContext* context, const Attributes& attributes) {
  using Shape = std::vector<int64_t>;
  LayerCall call;
  for (size_t i = 0; i < PLACES; ++i) call.inputs[i] = read_input(api, context, i);
  call.want_dimensions(TOKENS, 2);
  call.want_dimensions(ALL_GATE_UP, 3);
  call.want_dimensions(ALL_DOWN, 3);
  const int64_t parts = attributes.parts();
  const Shape& gate_up = call.inputs[ALL_GATE_UP].shape;
  const int64_t T = call.T = call.inputs[TOKENS].shape[0], H = call.H = call.inputs[TOKENS].shape[1];
  const int64_t E = call.E = gate_up[0], I = call.I = gate_up[attributes.transposed() ? 2 : 1] / parts;
  const std::string layout = text("layout '", LAYOUTS[static_cast<int>(attributes.layout)], "'");
  const std::string by = text(call.said(TOKENS), " and ", layout);
  const std::string sizes = text(call.said(TOKENS), " and ", call.said(ALL_GATE_UP));
  call.want_shape(ALL_GATE_UP, attributes.transposed() ? Shape{E, H, parts * I} : Shape{E, parts * I, H}, by);
  call.want_shape(ALL_DOWN, attributes.transposed() ? Shape{E, I, H} : Shape{E, H, I},
                  text(call.said(ALL_GATE_UP), " and ", layout));
  call.want_shape(ALL_GATE_UP_BIAS, {E, parts * I}, text(call.said(ALL_GATE_UP), " and ", layout));
  call.want_shape(ALL_DOWN_BIAS, {E, H}, sizes);
  call.want_shape(ROUTER_WEIGHT, {E, H}, sizes);
  call.want_shape(ROUTER_BIAS, {E}, sizes);
  call.want_shape(SELECTION_BIAS, {E}, sizes);
  if (call.inputs[SHARED_GATE_UP].given != call.inputs[SHARED_DOWN].given)
    refuse(OP, "shared_gate_up and shared_down go together, and one of them is missing");
  if (call.inputs[SHARED_DOWN].given) {
    call.want_dimensions(SHARED_DOWN, 2);
    call.S = call.inputs[SHARED_DOWN].shape[1];
    call.want_shape(SHARED_DOWN, {H, call.S}, by);
    call.want_shape(SHARED_GATE_UP, {parts * call.S, H}, text(call.said(SHARED_DOWN), " and ", layout));
  }
  if (T < 0 || H < 1 || E < 1) refuse(OP, "there is nothing to compute with ", sizes);
  return call;
}

class CudaLayer {
 public:
  CudaLayer(const OrtApi* api, const OrtKernelInfo* info, int element, const std::string& kernels = {})
      : attributes_(read_attributes(api, info)), gate_(read_gate(api, info)), element_(element),
        node_(api, info, OP, kernels) {}

  const OrtApi* api() const { return node_.api(); }

  void compute(OrtKernelContext* context) const {
    const LayerCall call = read_layer_call(api(), context, attributes_);
    if (gate_.top_k < 1 || gate_.top_k > call.E)
      refuse(OP, "top_k is ", gate_.top_k, "; of ", call.E, " experts it takes 1 to ", call.E);
    void* y = make_output(api(), context, Y, call.inputs[TOKENS].shape);
    void* chosen = make_output(api(), context, CHOSEN, {call.T, gate_.top_k});
    if (call.T == 0) return;
    std::vector<Buffer> buffers;
    for (size_t i = 0; i < PLACES; ++i) buffers.push_back({NAMES[i], call.inputs[i].data});
    buffers.push_back({"y", y});
    buffers.push_back({"experts", chosen});
    node_.launch(context, key(call), call.T, buffers);
  }

 private:
  Key key(const LayerCall& call) const {
    const bool biases[] = {call.inputs[ALL_GATE_UP_BIAS].given, call.inputs[ALL_DOWN_BIAS].given};
    const Routed routed{call.H, call.I, call.E, gate_.top_k, element_, biases[0], biases[1]};
    Key key = routed_key(OP, routed, attributes_);
    key.add("score", gate_.score).add("n_group", gate_.n_group).add("topk_group", gate_.topk_group);
    key.add("group_score", gate_.group_score).add("renormalize", gate_.renormalize);
    key.add("eps", gate_.eps).add("scale", gate_.scale).add("router_dtype", gate_.router_dtype);
    for (const Place place : {ROUTER_WEIGHT, ROUTER_BIAS, SELECTION_BIAS})
      key.add(NAMES[place], call.inputs[place].given ? type_name(call.inputs[place].element) : "none");
    return key.add("shared_width", call.S);
  }

  Attributes attributes_;
  Gate gate_;
  int element_;
  CudaNode node_;
};

// As the descriptor of DsMoE, but for names, numbers and types. The gate's types are the model's affair.
struct LayerOperator : CudaOperator<CudaLayer> {
  LayerOperator(int element_, const std::string& kernels_) : CudaOperator<CudaLayer>(element_, kernels_) {
    GetName = [](const OrtCustomOp*) { return OP; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return PLACES; };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      const bool gate = index >= ROUTER_WEIGHT && index <= SELECTION_BIAS;
      return gate ? int{ort::ANY} : static_cast<const LayerOperator*>(op)->element;
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      const bool wanted = index <= ROUTER_WEIGHT || index == ALL_GATE_UP || index == ALL_DOWN;
      return wanted ? int{ort::REQUIRED} : int{ort::OPTIONAL};
    };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return ANSWERS; };
    GetOutputType = [](const OrtCustomOp* op, size_t index) {
      return index == CHOSEN ? int{ort::INT64} : static_cast<const LayerOperator*>(op)->element;
    };
  }
};

}  // namespace

void add_cuda_layer_ops(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels) {
  static std::deque<LayerOperator> operators;  // sessions keep pointers to them
  for (const int element : {ort::FLOAT16, ort::BFLOAT16, ort::FLOAT}) {
    operators.emplace_back(element, kernels);
    check(api, ort::CustomOpDomain_Add(api, domain, &operators.back()));
  }
}

}  // namespace dsmoe
