// One token of one sequence on the CUDA execution provider: dsmoe::DsGemv and dsmoe::DsDecodeAttention.
//
// K depth and N rows of a weight; A heads of queries, G of keys and values, D their width, C slots of the cache, P
// positions with a cosine and a sine.
#include <algorithm>
#include <deque>

#include "cuda.h"
#include "cuda_node.h"

namespace dsmoe {
namespace {

class CudaGemv {
 public:
  static constexpr const char* OP = "DsGemv";
  enum Place : size_t { ROW, WEIGHT, PLACES };
  static constexpr const char* NAMES[PLACES] = {"x", "weight"};
  static constexpr size_t ANSWERS = 1;
  static int type(size_t, int element) { return element; }

  CudaGemv(const OrtApi* api, const OrtKernelInfo* info, int element, const std::string& kernels = {})
      : element_(element), node_(api, info, OP, kernels) {}

  const OrtApi* api() const { return node_.api(); }

  void compute(OrtKernelContext* context) const {
    Tensors tensors(api(), context, OP, NAMES);
    Shape shape = tensors.shape(ROW);
    if (shape.empty()) refuse(OP, "x is []; it must have 1 dimension at least");
    const int64_t K = shape.back();
    std::fill(shape.begin(), shape.end() - 1, 1);
    tensors.want_shape(ROW, shape, "kernels for one row");
    tensors.want_dimensions(WEIGHT, 2);
    const int64_t N = tensors.shape(WEIGHT)[0];
    tensors.want_shape(WEIGHT, {N, K}, tensors.said(ROW));
    shape.back() = N;
    tensors.add_output("y", shape);
    Key key(OP);
    key.add("depth", K).add("rows", N).add("dtype", type_name(element_));
    node_.launch(context, key, 1, tensors.buffers());
  }

 private:
  int element_;
  CudaNode node_;
};

class CudaDecodeAttention {
 public:
  static constexpr const char* OP = "DsDecodeAttention";
  enum Place : size_t { QKV, COS, SIN, POSITION, PAST_KEY, PAST_VALUE, PLACES };
  static constexpr const char* NAMES[PLACES] = {"qkv", "cos", "sin", "position", "past_key", "past_value"};
  static constexpr size_t ANSWERS = 3;
  static int type(size_t place, int element) { return place == POSITION ? int{ort::INT64} : element; }

  CudaDecodeAttention(const OrtApi* api, const OrtKernelInfo* info, int element, const std::string& kernels = {})
      : A_(attribute(api, info, OP, ort::GetAttribute_int64, "num_heads", int64_t{0})),
        G_(attribute(api, info, OP, ort::GetAttribute_int64, "kv_num_heads", int64_t{0})),
        scale_(attribute(api, info, OP, ort::GetAttribute_float, "scale", 0.0f)), element_(element),
        node_(api, info, OP, kernels) {
    if (A_ < 1 || G_ < 1 || A_ % G_ != 0)
      refuse(OP, "num_heads is ", A_, "; it must be a multiple of kv_num_heads, which is ", G_);
  }

  const OrtApi* api() const { return node_.api(); }

  void compute(OrtKernelContext* context) const {
    Tensors tensors(api(), context, OP, NAMES);
    tensors.want_dimensions(PAST_KEY, 4);
    tensors.want_dimensions(COS, 2);
    const Shape& past = tensors.shape(PAST_KEY);
    const int64_t C = past[2], D = past[3], P = tensors.shape(COS)[0];
    tensors.want_shape(PAST_KEY, {1, G_, C, D}, text("one sequence and kv_num_heads ", G_));
    tensors.want_shape(PAST_VALUE, past, tensors.said(PAST_KEY));
    tensors.want_shape(QKV, {1, 1, (A_ + 2 * G_) * D}, text("num_heads ", A_, " and ", tensors.said(PAST_KEY)));
    tensors.want_shape(COS, {P, D / 2}, tensors.said(PAST_KEY));
    tensors.want_shape(SIN, {P, D / 2}, tensors.said(COS));
    tensors.want_shape(POSITION, {1}, "kernels for one token");
    tensors.add_output("y", {1, 1, A_ * D});
    keep(context, tensors[PAST_KEY].data, tensors.add_output("present_key", past), G_ * C * D);
    keep(context, tensors[PAST_VALUE].data, tensors.add_output("present_value", past), G_ * C * D);
    Key key(OP);
    key.add("heads", A_).add("groups", G_).add("width", D).add("slots", C).add("positions", P);
    key.add("scale", scale_).add("dtype", type_name(element_));
    node_.launch(context, key, 1, tensors.buffers());
  }

 private:
  // The kernels write one slot and read the others where they write: what the past holds must be there, too.
  void keep(const OrtKernelContext* context, const void* past, void* present, int64_t count) const {
    if (present != past) node_.copy(context, past, present, count * (element_ == ort::FLOAT ? 4 : 2));
  }

  int64_t A_, G_;
  float scale_;
  int element_;
  CudaNode node_;
};

// As the descriptor of DsMoE, but for names, numbers and types.
template <class Kernel>
struct DecodeOperator : CudaOperator<Kernel> {
  DecodeOperator(int element_, const std::string& kernels_) : CudaOperator<Kernel>(element_, kernels_) {
    this->GetName = [](const OrtCustomOp*) { return Kernel::OP; };
    this->GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::PLACES; };
    this->GetInputType = [](const OrtCustomOp* op, size_t index) {
      return Kernel::type(index, static_cast<const DecodeOperator*>(op)->element);
    };
    this->GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return int{ort::REQUIRED}; };
    this->GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::ANSWERS; };
  }
};

template <class Kernel>
void add(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels) {
  static std::deque<DecodeOperator<Kernel>> operators;  // sessions keep pointers to them
  for (const int element : {ort::FLOAT16, ort::BFLOAT16, ort::FLOAT}) {
    operators.emplace_back(element, kernels);
    check(api, ort::CustomOpDomain_Add(api, domain, &operators.back()));
  }
}

}  // namespace

void add_cuda_decode_ops(const OrtApi* api, OrtCustomOpDomain* domain, const std::string& kernels) {
  add<CudaGemv>(api, domain, kernels);
  add<CudaDecodeAttention>(api, domain, kernels);
}

}  // namespace dsmoe
