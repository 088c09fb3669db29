// Chooses the arithmetic by what the processor can do, once.
#include "cpu_machine.h"

#include <cstdlib>
#include <cstring>

namespace dsmoe::cpu {
namespace {

const Machine& choose() {
  const Machine* able[3] = {&PLAIN};
  int count = 1;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    able[count++] = &AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      able[count++] = &AVX512;
  }
#endif
  const char* asked = std::getenv("DSMOE_CPU");
  if (asked == nullptr || *asked == '\0') return *able[count - 1];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(able[i]->name, asked) == 0) return *able[i];
    names += std::string(i ? ", " : "") + able[i]->name;
  }
  throw Refusal(text("DSMOE_CPU is '", asked, "'; this processor runs ", names));
}

}  // namespace

const Machine& machine() {
  static const Machine& chosen = choose();
  return chosen;
}

}  // namespace dsmoe::cpu
