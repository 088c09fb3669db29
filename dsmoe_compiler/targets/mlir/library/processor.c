/* What this processor can run: asked of itself and of the system, which has to save the wide registers. */
#include "inside.h"

#include <cpuid.h>
#include <stdio.h>
#include <string.h>

#if !defined(__x86_64__)
#error "the objects of this model are for x86-64"
#endif

enum { EAX, EBX, ECX, EDX };

/* `state`: what the system must save (bits of XCR0). */
typedef struct {
  const char *name;
  unsigned leaf, subleaf, word, bit, state;
} Feature;

enum { YMM = 0x6, ZMM = 0xe6 }; /* of XCR0 */

static const Feature known[] = {
    {"fma", 1, 0, ECX, 12, YMM},        {"movbe", 1, 0, ECX, 22, 0},        {"popcnt", 1, 0, ECX, 23, 0},
    {"avx", 1, 0, ECX, 28, YMM},        {"f16c", 1, 0, ECX, 29, YMM},       {"bmi1", 7, 0, EBX, 3, 0},
    {"avx2", 7, 0, EBX, 5, YMM},        {"bmi2", 7, 0, EBX, 8, 0},          {"abm", 0x80000001, 0, ECX, 5, 0},
    {"avx512f", 7, 0, EBX, 16, ZMM},    {"avx512dq", 7, 0, EBX, 17, ZMM},   {"avx512cd", 7, 0, EBX, 28, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},   {"avx512vl", 7, 0, EBX, 31, ZMM},   {"avx512_bf16", 7, 1, EAX, 5, ZMM},
};

/* The registers that the system saves; 0 if it says nothing. */
static unsigned saved(void) {
  unsigned word[4] = {0}, high = 0, low = 0;
  if (!__get_cpuid(1, &word[0], &word[1], &word[2], &word[3]) || !(word[ECX] >> 27 & 1)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

static int has(const char *name) {
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    const Feature *one = &known[i];
    if (strcmp(one->name, name)) continue;
    unsigned word[4] = {0};
    if (!__get_cpuid_count(one->leaf, one->subleaf, &word[0], &word[1], &word[2], &word[3])) return 0;
    return (word[one->word] >> one->bit & 1) && (!one->state || (saved() & one->state) == one->state);
  }
  return 0; /* what is not known here is not relied upon */
}

const char *missing_feature(const char *const *features) {
  for (; *features; features++)
    if (!has(*features)) return *features;
  return NULL;
}

const Level *choose_level(const char *name, char *error, size_t size) {
  char names[256] = "";
  for (int i = 0; i < tables.level_count; i++) {
    const size_t used = strlen(names);
    snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", tables.levels[i].name);
  }
  for (int i = tables.level_count - 1; i >= 0; i--) {
    const Level *level = &tables.levels[i];
    if (name && strcmp(name, level->name)) continue;
    const char *missing = missing_feature(level->features);
    if (!missing) return level;
    if (name || i == 0) {
      refuse(error, size, "level %s uses %s, which this processor or system lacks; this library holds %s. Compile the "
             "model again for this machine, or with --level", level->name, missing, names);
      return NULL;
    }
  }
  refuse(error, size, "this library holds no level %s; it holds %s", name, names);
  return NULL;
}
