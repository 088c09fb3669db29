// The arithmetic for x86-64 with AVX-512: 32 registers of sixteen floats, 24 of them sums.
#if defined(__x86_64__)
#include <immintrin.h>

#define MACHINE AVX512
#define NAME "avx512"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define LANES 16
#define TILES 12, 6, 6, 6
// masked by nothing: GCC warns of the plain one, in its own header
#define WIDEN_F16(from) (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(from)))
#include "cpu_machine.inc"
#endif
