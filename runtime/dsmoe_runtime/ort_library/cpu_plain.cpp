// The arithmetic for any processor that GCC or Clang compile for: vectors of four, as SSE2 and NEON have them.
#define MACHINE PLAIN
#define NAME "plain"
#define TARGET
#define LANES 4
#define TILES 6, 6, 4, 3
#include "cpu_machine.inc"
