// What the kernel asks of the processor: the arithmetic, written once (cpu_machine.inc), compiled for several of them.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace dsmoe::cpu {

using Bits = uint16_t;  // a float16 or bfloat16 as it lies in memory

inline constexpr int64_t ROWS = 12;     // rows of a weight that are multiplied together, and called for ahead of time
inline constexpr int64_t TURNED = 48;   // the same of a transposed weight, whose rows are columns in memory
inline constexpr int64_t DEPTH = 1024;  // of one pass over k: four rows of x and three of a weight stay in the L1 cache
inline constexpr int64_t WIDEST = 16;   // floats in the longest vector of all; buffers of `activate` end on it

// Elements from one row of floats to the next: rows 4096 bytes apart would share few lines of the cache.
inline constexpr int64_t spaced(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }

// Some rows of x times some rows of a weight: out[m][n] = sum over k of rows[m][k] * weight[n][k].
struct Product {
  const float* const* rows;  // M of them, K long
  int64_t M;
  const void* weight;  // row n begins n * stride elements on; transposed: its element k is k * stride + n elements on
  int64_t N, K, stride;
  bool transposed;
  const void* next;  // rows of a weight that will be wanted after these, to be called for ahead of time, or null
  float* out;        // [M, out_stride]
  int64_t out_stride;
  float* panel;  // [TURNED, spaced(DEPTH)] of scratch, for a transposed weight
};

struct Machine {
  const char* name;
  void (*multiply_float)(const Product&);
  void (*multiply_float16)(const Product&);
  void (*multiply_bfloat16)(const Product&);
  // gate[n] = activation of gate[n] and up[n], or of gate[n] alone (up null); works up to the next multiple of WIDEST.
  void (*activate)(float* gate, const float* up, int64_t n, const Attributes&);
  void (*add)(float* sum, const float* term, float factor, int64_t n);  // sum[n] += factor * term[n]
  void (*widen_float16)(float* to, const Bits* from, int64_t n);
  void (*widen_bfloat16)(float* to, const Bits* from, int64_t n);
  void (*narrow_float16)(Bits* to, const float* from, int64_t n);  // to the nearest, ties to even; NaN stays NaN
  void (*narrow_bfloat16)(Bits* to, const float* from, int64_t n);
};

extern const Machine PLAIN;
#if defined(__x86_64__)
extern const Machine AVX2, AVX512;
#endif

// The best of these that this processor runs; $DSMOE_CPU (plain, avx2, avx512) names one.
const Machine& machine();

}  // namespace dsmoe::cpu
