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
  Tensors tensors;
  int64_t T = 0, H = 0, E = 0, I = 0, S = 0;
};

LayerCall read_layer_call(const OrtApi* api, OrtKernelContext* context, const Attributes& attributes) {
  LayerCall call{{api, context, OP, NAMES}};
  const Tensors& tensors = call.tensors;
  tensors.want_dimensions(TOKENS, 2);
  tensors.want_dimensions(ALL_GATE_UP, 3);
  tensors.want_dimensions(ALL_DOWN, 3);
  const int64_t parts = attributes.parts();
  const Shape& gate_up = tensors[ALL_GATE_UP].shape;
  const int64_t T = call.T = tensors[TOKENS].shape[0], H = call.H = tensors[TOKENS].shape[1];
  const int64_t E = call.E = gate_up[0], I = call.I = gate_up[attributes.transposed() ? 2 : 1] / parts;
  const std::string layout = text("layout '", LAYOUTS[static_cast<int>(attributes.layout)], "'");
  const std::string by = text(tensors.said(TOKENS), " and ", layout);
  const std::string sizes = text(tensors.said(TOKENS), " and ", tensors.said(ALL_GATE_UP));
  tensors.want_shape(ALL_GATE_UP, attributes.transposed() ? Shape{E, H, parts * I} : Shape{E, parts * I, H}, by);
  tensors.want_shape(ALL_DOWN, attributes.transposed() ? Shape{E, I, H} : Shape{E, H, I},
                     text(tensors.said(ALL_GATE_UP), " and ", layout));
  tensors.want_shape_if_given(ALL_GATE_UP_BIAS, {E, parts * I}, text(tensors.said(ALL_GATE_UP), " and ", layout));
  tensors.want_shape_if_given(ALL_DOWN_BIAS, {E, H}, sizes);
  tensors.want_shape_if_given(ROUTER_WEIGHT, {E, H}, sizes);
  tensors.want_shape_if_given(ROUTER_BIAS, {E}, sizes);
  tensors.want_shape_if_given(SELECTION_BIAS, {E}, sizes);
  if (tensors[SHARED_GATE_UP].given != tensors[SHARED_DOWN].given)
    refuse(OP, "shared_gate_up and shared_down go together, and one of them is missing");
  if (tensors[SHARED_DOWN].given) {
    tensors.want_dimensions(SHARED_DOWN, 2);
    call.S = tensors[SHARED_DOWN].shape[1];
    tensors.want_shape(SHARED_DOWN, {H, call.S}, by);
    tensors.want_shape_if_given(SHARED_GATE_UP, {parts * call.S, H}, text(tensors.said(SHARED_DOWN), " and ", layout));
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
    LayerCall call = read_layer_call(api(), context, attributes_);
    if (gate_.top_k < 1 || gate_.top_k > call.E)
      refuse(OP, "top_k is ", gate_.top_k, "; of ", call.E, " experts it takes 1 to ", call.E);
    call.tensors.add_output("y", call.tensors.shape(TOKENS));
    call.tensors.add_output("experts", {call.T, gate_.top_k});
    if (call.T == 0) return;
    node_.launch(context, key(call), call.T, call.tensors.buffers());
  }

 private:
  Key key(const LayerCall& call) const {
    const bool biases[] = {call.tensors[ALL_GATE_UP_BIAS].given, call.tensors[ALL_DOWN_BIAS].given};
    const Routed routed{call.H, call.I, call.E, gate_.top_k, element_, biases[0], biases[1]};
    Key key = routed_key(OP, routed, attributes_);
    key.add("score", gate_.score).add("n_group", gate_.n_group).add("topk_group", gate_.topk_group);
    key.add("group_score", gate_.group_score).add("renormalize", gate_.renormalize);
    key.add("eps", gate_.eps).add("scale", gate_.scale).add("router_dtype", gate_.router_dtype);
    for (const Place place : {ROUTER_WEIGHT, ROUTER_BIAS, SELECTION_BIAS})
      key.add(NAMES[place], call.tensors[place].given ? type_name(call.tensors[place].element) : "none");
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
