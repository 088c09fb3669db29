// The arithmetic for x86-64 with AVX2, FMA and F16C: 16 registers of eight floats, 12 of them sums.
#if defined(__x86_64__)
#include <immintrin.h>

#define MACHINE AVX2
#define NAME "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define TILES 12, 6, 4, 3
#define WIDEN_F16(from) (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from)))
#include "cpu_machine.inc"
#endif
