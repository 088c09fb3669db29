// The routed experts on a CPU: slots sorted by expert, two rounds of products, then each token's weighted sum.
//
// A slot is one (token, k); those of an expert stand together. A round is cut into items (an expert, some of its slots,
// some columns) that do not depend on how many threads there are; threads of the runtime's own pool take one by one.
// T tokens, H hidden size, E experts, I expert width, K experts per token, N slots that count.
#include "cpu_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "cpu_machine.h"

namespace dsmoe::cpu {
namespace {

constexpr int64_t SLOTS = 256;     // in an item
constexpr int64_t COLUMNS = 48;    // of an item; of gate and up together twice as many
constexpr int64_t CHUNK = 16384;   // slots that are worked on at a time: what bounds the memory that a call takes
constexpr int64_t TOKENS = 16;     // in an item of the last round
constexpr int64_t MOST_THREADS = 256;

using Floats = std::unique_ptr<float[]>;

Floats uninitialised(int64_t count) { return Floats(new float[std::max<int64_t>(count, 1)]); }

// What one thread needs for itself.
struct Scratch {
  const float* rows[SLOTS];
  float product[SLOTS * 2 * COLUMNS];
  float gate[COLUMNS + WIDEST], up[COLUMNS + WIDEST];
  float panel[TURNED * spaced(DEPTH)];
};

// Runs body(item, scratch) for every item, on as many threads as the runtime's pool has.
template <class Body>
void in_parallel(const OrtApi* api, const OrtKernelContext* context, int64_t items, Scratch* scratch, int64_t threads,
                 const Body& body) {
  struct Work {
    const Body& body;
    Scratch* scratch;
    int64_t items;
    std::atomic<int64_t> next{0};
  } work{body, scratch, items};
  const auto task = [](void* data, size_t index) {
    auto& work = *static_cast<Work*>(data);
    for (int64_t item = work.next++; item < work.items; item = work.next++) work.body(item, work.scratch[index]);
  };
  const int64_t tasks = std::min(items, threads);
  if (tasks == 1) return task(&work, 0);
  if (tasks > 1) check(api, ort::ParallelFor(api, context, task, tasks, 0, &work));
}

// The slots of some tokens sorted by expert; those of one expert ascend. Ids outside [0, E) are left out.
struct Dispatch {
  std::vector<int64_t> begins;    // [E + 1]: where an expert's slots begin among `tokens`
  std::vector<int64_t> tokens;    // [N]
  std::vector<int64_t> places;    // [T, K]: a slot's place in `tokens`, or -1

  struct Group {
    int64_t expert, begin, count;
  };
  std::vector<Group> groups;  // no more than SLOTS of one expert

  Dispatch(const int64_t* ids, int64_t T, int64_t K, int64_t E) : begins(E + 1), places(T * K, -1) {
    const auto counts = [E](int64_t id) { return id >= 0 && id < E; };
    for (int64_t i = 0; i < T * K; ++i)
      if (counts(ids[i])) ++begins[ids[i] + 1];
    for (int64_t e = 0; e < E; ++e) {
      begins[e + 1] += begins[e];
      for (int64_t at = begins[e]; at < begins[e + 1]; at += SLOTS)
        groups.push_back({e, at, std::min(SLOTS, begins[e + 1] - at)});
    }
    tokens.resize(begins[E]);
    std::vector<int64_t> ends(begins.begin(), begins.end() - 1);
    for (int64_t i = 0; i < T * K; ++i) {
      if (!counts(ids[i])) continue;
      places[i] = ends[ids[i]]++;
      tokens[places[i]] = i / K;
    }
  }
};

class Kernel {
 public:
  Kernel(const OrtApi* api, const OrtKernelInfo* info, int element)
      : api_(api), attributes_(read_attributes(api, info)), element_(element), machine_(machine()) {}

  void compute(OrtKernelContext* context) const {
    const Call call = read_call(api_, context, attributes_);
    const int64_t step = std::max<int64_t>(1, CHUNK / std::max<int64_t>(1, call.K));
    static const int64_t threads = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, MOST_THREADS);
    const std::unique_ptr<Scratch[]> scratch(new Scratch[threads]);
    for (int64_t t = 0; t < call.T; t += step)
      some_tokens(context, call, t, std::min(step, call.T - t), scratch.get(), threads);
  }

 private:
  // `T` tokens from `first` on.
  void some_tokens(OrtKernelContext* context, const Call& call, int64_t first, int64_t T, Scratch* scratch,
                   int64_t threads) const {
    const int64_t H = call.H, I = call.I, K = call.K;
    const Dispatch dispatch(call.inputs[EXPERTS].as<int64_t>() + first * K, T, K, call.E);
    const int64_t x_stride = spaced(H), parts = (T + TOKENS - 1) / TOKENS;
    const Floats x = uninitialised(T * x_stride);
    in_parallel(api_, context, parts, scratch, threads, [&](int64_t part, Scratch&) {
      for (int64_t t = part * TOKENS; t < std::min(T, (part + 1) * TOKENS); ++t)
        widen(x.get() + t * x_stride, call.inputs[X].data, (first + t) * H, H);
    });

    const int64_t N = dispatch.tokens.size();
    const int64_t hidden_stride = spaced(I);
    const Floats hidden = uninitialised(N * hidden_stride), answers = uninitialised(N * H);

    const int64_t blocks_I = (I + COLUMNS - 1) / COLUMNS;
    in_parallel(api_, context, dispatch.groups.size() * blocks_I, scratch, threads, [&](int64_t item, Scratch& s) {
      const Dispatch::Group& group = dispatch.groups[item / blocks_I];
      for (int64_t m = 0; m < group.count; ++m) s.rows[m] = x.get() + dispatch.tokens[group.begin + m] * x_stride;
      const int64_t column = item % blocks_I * COLUMNS;
      to_hidden(call, group, column, std::min(COLUMNS, I - column), hidden.get() + group.begin * hidden_stride, s);
    });

    const int64_t width = 2 * COLUMNS, blocks_H = (H + width - 1) / width;
    in_parallel(api_, context, dispatch.groups.size() * blocks_H, scratch, threads, [&](int64_t item, Scratch& s) {
      const Dispatch::Group& group = dispatch.groups[item / blocks_H];
      for (int64_t m = 0; m < group.count; ++m) s.rows[m] = hidden.get() + (group.begin + m) * hidden_stride;
      const int64_t column = item % blocks_H * width;
      to_answers(call, group, column, std::min(width, H - column), answers.get() + group.begin * H, s);
    });

    const float* weights = call.inputs[WEIGHTS].as<float>() + first * K;
    const Floats sums = element_ == ort::FLOAT ? nullptr : uninitialised(T * H);
    in_parallel(api_, context, parts, scratch, threads, [&](int64_t part, Scratch&) {
      for (int64_t t = part * TOKENS; t < std::min(T, (part + 1) * TOKENS); ++t) {
        float* sum = sums ? sums.get() + t * H : static_cast<float*>(call.y) + (first + t) * H;
        std::fill_n(sum, H, 0.0f);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t place = dispatch.places[t * K + k];
          if (place >= 0) machine_.add(sum, answers.get() + place * H, weights[t * K + k], H);
        }
        if (sums) narrow(call.y, (first + t) * H, sum, H);
      }
    });
  }

  // hidden[m][column...] of a group: gate and up of `columns` columns, then the activation.
  void to_hidden(const Call& call, const Dispatch::Group& group, int64_t column, int64_t columns, float* hidden,
                 Scratch& s) const {
    const int64_t parts = attributes_.parts(), width = parts * call.I, stride = parts * columns;
    const bool apart = parts == 2 && !attributes_.interleaved();
    for (int64_t part = 0; part < (apart ? 2 : 1); ++part) {
      const int64_t rows = apart ? columns : stride, row = apart ? part * call.I + column : parts * column;
      const int64_t after = column + columns < call.I ? (apart ? 1 : parts) * (column + columns) : -1;
      const int64_t next = apart && part == 0 ? call.I + column : after;
      multiply(call.inputs[GATE_UP], group, {width, call.H, row, rows, next}, s.product + part * columns, stride, s);
    }
    const int64_t gate_at = apart ? column : parts * column, up_at = apart ? call.I + column : gate_at + 1;
    const int64_t across = apart ? 1 : parts, up_in = apart ? columns : 1;
    float bias_gate[COLUMNS] = {}, bias_up[COLUMNS] = {};
    if (call.inputs[GATE_UP_BIAS].given) {
      const void* bias = call.inputs[GATE_UP_BIAS].data;
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t at = group.expert * width + i * across;
        widen(bias_gate + i, bias, at + gate_at, 1);
        if (parts == 2) widen(bias_up + i, bias, at + up_at, 1);
      }
    }
    std::fill_n(s.gate + columns, WIDEST, 0.0f);
    std::fill_n(s.up + columns, WIDEST, 0.0f);
    for (int64_t m = 0; m < group.count; ++m) {
      const float* joint = s.product + m * stride;
      for (int64_t i = 0; i < columns; ++i) s.gate[i] = joint[i * across] + bias_gate[i];
      if (parts == 2)
        for (int64_t i = 0; i < columns; ++i) s.up[i] = joint[up_in + i * across] + bias_up[i];
      machine_.activate(s.gate, parts == 2 ? s.up : nullptr, columns, attributes_);
      std::copy_n(s.gate, columns, hidden + m * spaced(call.I) + column);
    }
  }

  // answers[m][column...] of a group: its hidden states times down.
  void to_answers(const Call& call, const Dispatch::Group& group, int64_t column, int64_t columns, float* answers,
                  Scratch& s) const {
    const int64_t next = column + columns < call.H ? column + columns : -1;
    multiply(call.inputs[DOWN], group, {call.H, call.I, column, columns, next}, s.product, columns, s);
    float bias[2 * COLUMNS] = {};
    if (call.inputs[DOWN_BIAS].given) widen(bias, call.inputs[DOWN_BIAS].data, group.expert * call.H + column, columns);
    for (int64_t m = 0; m < group.count; ++m)
      for (int64_t i = 0; i < columns; ++i) answers[m * call.H + column + i] = s.product[m * columns + i] + bias[i];
  }

  // Rows [row, row + rows) of an expert's matrix [height, depth]; after them those from `next` on are wanted, or -1.
  struct Part {
    int64_t height, depth, row, rows, next;
  };

  // The scratch's rows times a part of the group's expert's matrix.
  void multiply(const Tensor& weight, const Dispatch::Group& group, const Part& part, float* out, int64_t out_stride,
                Scratch& s) const {
    const bool turned = attributes_.transposed();
    const int64_t size = element_ == ort::FLOAT ? 4 : 2;
    const char* matrix = weight.as<char>() + group.expert * part.height * part.depth * size;
    const auto row = [&](int64_t index) { return matrix + index * (turned ? 1 : part.depth) * size; };
    Product product;
    product.rows = s.rows;
    product.M = group.count;
    product.weight = row(part.row);
    product.N = part.rows;
    product.K = part.depth;
    product.stride = turned ? part.height : part.depth;
    product.transposed = turned;
    product.next = part.next < 0 ? nullptr : row(part.next);
    product.out = out;
    product.out_stride = out_stride;
    product.panel = s.panel;
    if (element_ == ort::FLOAT) machine_.multiply_float(product);
    if (element_ == ort::FLOAT16) machine_.multiply_float16(product);
    if (element_ == ort::BFLOAT16) machine_.multiply_bfloat16(product);
  }

  void widen(float* to, const void* from, int64_t at, int64_t n) const {
    if (element_ == ort::FLOAT) std::copy_n(static_cast<const float*>(from) + at, n, to);
    if (element_ == ort::FLOAT16) machine_.widen_float16(to, static_cast<const Bits*>(from) + at, n);
    if (element_ == ort::BFLOAT16) machine_.widen_bfloat16(to, static_cast<const Bits*>(from) + at, n);
  }

  void narrow(void* to, int64_t at, const float* from, int64_t n) const {
    if (element_ == ort::FLOAT16) machine_.narrow_float16(static_cast<Bits*>(to) + at, from, n);
    if (element_ == ort::BFLOAT16) machine_.narrow_bfloat16(static_cast<Bits*>(to) + at, from, n);
  }

  const OrtApi* api_;
  Attributes attributes_;
  int element_;
  const Machine& machine_;
};

}  // namespace
}  // namespace dsmoe::cpu

namespace dsmoe {

void add_cpu_ops(const OrtApi* api, OrtCustomOpDomain* domain) {
  static const Operator<cpu::Kernel> operators[] = {{"CPUExecutionProvider", ort::FLOAT},
                                                    {"CPUExecutionProvider", ort::FLOAT16},
                                                    {"CPUExecutionProvider", ort::BFLOAT16}};
  for (const auto& op : operators) check(api, ort::CustomOpDomain_Add(api, domain, &op));
}

}  // namespace dsmoe
