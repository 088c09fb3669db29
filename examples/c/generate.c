/* Greedy text from an artifact of `dsmoe compile --format mlir`: plain C, no Python and no torch in the process.
 *
 *   generate ARTIFACT 256,72,101 32        prints the 32 ids that follow these three
 *   generate ARTIFACT 256,72,101 32 avx2   with these instructions, whatever else the processor could do
 */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* The most likely token, or -1: the logits are not numbers. */
static int64_t best(const float *logits, int64_t count) {
  int64_t place = 0;
  for (int64_t i = 0; i < count; i++) {
    if (logits[i] != logits[i]) return -1;
    if (logits[i] > logits[place]) place = i;
  }
  return place;
}

/* "256,72,101" as numbers; how many there are, or -1. */
static int64_t parse(const char *text, int64_t *ids, int64_t most) {
  for (int64_t count = 0; count < most;) {
    char *end;
    ids[count++] = strtoll(text, &end, 10);
    if (end == text || (*end && *end != ',')) return -1;
    if (!*end) return count;
    text = end + 1;
  }
  return -1;
}

static int failed(const char *why) {
  fprintf(stderr, "generate: %s\n", why);
  return 1;
}

int main(int argc, char **argv) {
  if (argc != 4 && argc != 5) return fprintf(stderr, "usage: generate ARTIFACT ID,ID,... NEW_TOKENS [LEVEL]\n"), 2;
  char error[512];
  dsmoe_model *model = dsmoe_create(argv[1], argc == 5 ? argv[4] : NULL, error, sizeof error);
  if (!model) return failed(error);

  const int64_t capacity = dsmoe_capacity(model), vocabulary = dsmoe_vocabulary(model), fresh = atoll(argv[3]);
  int64_t *ids = calloc((size_t)capacity + 1, sizeof *ids);
  float *logits = calloc((size_t)vocabulary, sizeof *logits);
  if (!ids || !logits) return failed("no memory");
  if (dsmoe_batch(model) != 1) return failed("the model was compiled for several sequences at a time");
  const int64_t length = parse(argv[2], ids, capacity + 1);
  if (length < 0 || fresh < 1 || length + fresh > capacity)
    return failed("give ids as 256,72,101 and at least one new token; together they must fit the model's max_seq_len");

  if (dsmoe_prefill(model, ids, length, logits)) return failed(dsmoe_error(model));
  struct timespec start, end;
  timespec_get(&start, TIME_UTC);
  for (int64_t i = 0; i < fresh; i++) {
    const int64_t token = best(logits, vocabulary);
    if (token < 0) return failed("the logits are not numbers");
    printf("%lld%s", (long long)token, i + 1 < fresh ? "," : "\n");
    fflush(stdout);
    if (i + 1 < fresh && dsmoe_decode(model, &token, dsmoe_length(model), logits)) return failed(dsmoe_error(model));
  }
  timespec_get(&end, TIME_UTC);
  const double seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
  fprintf(stderr, "%s, %.1f tokens/s\n", dsmoe_level(model), (double)(fresh - 1) / seconds);

  free(logits);
  free(ids);
  dsmoe_destroy(model);
  return 0;
}
