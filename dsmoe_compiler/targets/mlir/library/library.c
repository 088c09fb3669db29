/* The functions of model.h: a model is its weights, its caches, and memory that the programs work in.
 *
 * The programs trust what they are given, so all of it is checked here. */
#define _GNU_SOURCE
#include "model.h"

#include "inside.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct dsmoe_model {
  const Level *level;
  Weights weights;
  char *caches; /* all of them, one after the other */
  size_t cache_bytes;
  void **prefill, **decode; /* addresses for each program: arguments, then the workspace */
  int64_t *sizes, *bytes;   /* of the free dimensions and of the outputs of a call */
  char *memory;             /* outputs and workspace */
  size_t memory_bytes;
  int64_t length, position;
  char error[512];
};

int refuse(char *error, size_t size, const char *format, ...) {
  va_list values;
  va_start(values, format);
  if (size) vsnprintf(error, size, format, values);
  va_end(values);
  return -1;
}

static size_t aligned(int64_t bytes) { return ((size_t)bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Opening -------------------------------------------------------------------------------------------------------- */

static int make_caches(dsmoe_model *model, char *error, size_t size) {
  model->cache_bytes = ALIGNMENT;
  for (int i = 0; i < tables.cache_count; i++) model->cache_bytes += aligned(tables.caches[i]);
  void *start = mmap(NULL, model->cache_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return refuse(error, size, "no memory for caches of %zu bytes", model->cache_bytes);
  model->caches = start; /* zeros: what was never written is masked, but must be numbers */
  return 0;
}

/* The addresses that are the same in every call. */
static void **fixed_addresses(const dsmoe_model *model, const Phase *phase) {
  void **data = calloc((size_t)phase->count + 1, sizeof(void *));
  for (int i = 0; data && i < phase->count; i++) {
    const Argument *argument = &phase->arguments[i];
    if (argument->kind == WEIGHT) data[i] = model->weights.addresses[argument->number];
    if (argument->kind == POSITION) data[i] = (void *)&model->position;
    if (argument->kind == CACHE) {
      char *place = model->caches;
      for (int j = 0; j < argument->number; j++) place += aligned(tables.caches[j]);
      data[i] = place;
    }
  }
  return data;
}

static int64_t *numbers(int a, int b) { return calloc((size_t)(a > b ? a : b) + 1, sizeof(int64_t)); }

static int open_model(dsmoe_model *model, const char *folder, const char *level, char *error, size_t size) {
  if (!folder) return refuse(error, size, "folder is NULL; name the artifact's folder");
  model->level = choose_level(level, error, size);
  if (!model->level || map_weights(&model->weights, folder, error, size) || make_caches(model, error, size)) return -1;
  model->prefill = fixed_addresses(model, &tables.prefill);
  model->decode = fixed_addresses(model, &tables.decode);
  model->sizes = numbers(tables.prefill.sizes, tables.decode.sizes);
  model->bytes = numbers(tables.prefill.outputs, tables.decode.outputs);
  if (!model->prefill || !model->decode || !model->sizes || !model->bytes) return refuse(error, size, "no memory");
  return 0;
}

dsmoe_model *dsmoe_create(const char *folder, const char *level, char *error, size_t size) {
  if (!error) size = 0;
  if (size) *error = 0;
  dsmoe_model *model = calloc(1, sizeof *model);
  if (!model) {
    refuse(error, size, "no memory");
    return NULL;
  }
  if (open_model(model, folder, level, error, size)) {
    dsmoe_destroy(model);
    return NULL;
  }
  return model;
}

void dsmoe_destroy(dsmoe_model *model) {
  if (!model) return;
  unmap_weights(&model->weights);
  if (model->caches) munmap(model->caches, model->cache_bytes);
  free(model->prefill);
  free(model->decode);
  free(model->sizes);
  free(model->bytes);
  free(model->memory);
  free(model);
}

/* Running -------------------------------------------------------------------------------------------------------- */

static float half(uint16_t value) {
  const int exponent = value >> 10 & 31, fraction = value & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
                                    : ldexpf((float)fraction, -24);
  return value >> 15 ? -size : size;
}

static float number(const char *start, int64_t index, Format format) {
  if (format == FLOAT32) return ((const float *)start)[index];
  const uint16_t stored = ((const uint16_t *)start)[index];
  if (format == FLOAT16) return half(stored);
  const uint32_t wide = (uint32_t)stored << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

/* Memory for the outputs and the workspace of a call: kept, and grown. */
static int reserve(dsmoe_model *model, size_t bytes) {
  if (bytes <= model->memory_bytes) return 0;
  void *memory = NULL;
  if (posix_memalign(&memory, ALIGNMENT, bytes))
    return refuse(model->error, sizeof model->error, "no memory to work in: %zu bytes", bytes);
  free(model->memory);
  model->memory = memory;
  model->memory_bytes = bytes;
  return 0;
}

static int run(dsmoe_model *model, const Phase *phase, const Code *code, void **data, const int64_t *ids, int64_t n,
               float *logits) {
  Place place;
  phase->measure(n, model->sizes, model->bytes, &place);
  size_t total = ALIGNMENT + aligned(code->workspace(model->sizes));
  for (int i = 0; i < phase->outputs; i++) total += aligned(model->bytes[i]);
  if (reserve(model, total)) return -1;
  char *next = model->memory, *start = NULL;
  for (int i = 0; i < phase->count; i++) {
    const Argument *argument = &phase->arguments[i];
    if (argument->kind == IDS) data[i] = (void *)ids; /* only read */
    if (argument->kind != OUTPUT) continue;
    data[i] = next;
    if (argument->number == phase->logits) start = next;
    next += aligned(model->bytes[argument->number]);
  }
  data[phase->count] = next;
  code->run(data, model->sizes);
  for (int64_t row = 0; row < tables.batch; row++)
    for (int64_t i = 0; i < tables.vocabulary; i++)
      logits[row * tables.vocabulary + i] =
          number(start, place.offset + row * place.row + i * place.column, phase->format);
  return 0;
}

static int check(dsmoe_model *model, const int64_t *ids, int64_t n, const float *logits) {
  model->error[0] = 0;
  if (!ids || !logits) return refuse(model->error, sizeof model->error, "%s is NULL", ids ? "logits" : "ids");
  for (int64_t i = 0; i < tables.batch * n; i++)
    if (ids[i] < 0 || ids[i] >= tables.vocabulary)
      return refuse(model->error, sizeof model->error, "id %lld, number %lld, is not in the vocabulary of %lld",
                    (long long)ids[i], (long long)i, (long long)tables.vocabulary);
  return 0;
}

int dsmoe_prefill(dsmoe_model *model, const int64_t *ids, int64_t n, float *logits) {
  if (n < 1 || n > tables.capacity)
    return refuse(model->error, sizeof model->error, "the prompt has %lld tokens; 1 to %lld fit (max_seq_len)",
                  (long long)n, (long long)tables.capacity);
  if (check(model, ids, n, logits)) return -1;
  if (run(model, &tables.prefill, &model->level->prefill, model->prefill, ids, n, logits)) return -1;
  model->length = n;
  return 0;
}

int dsmoe_decode(dsmoe_model *model, const int64_t *tokens, int64_t position, float *logits) {
  if (position < 0 || position >= tables.capacity)
    return refuse(model->error, sizeof model->error, "position is %lld; the cache has positions 0 to %lld",
                  (long long)position, (long long)tables.capacity - 1);
  if (position > model->length)
    return refuse(model->error, sizeof model->error, "position is %lld, but only %lld are filled: none may be left out",
                  (long long)position, (long long)model->length);
  if (check(model, tokens, 1, logits)) return -1;
  model->position = position;
  if (run(model, &tables.decode, &model->level->decode, model->decode, tokens, 1, logits)) return -1;
  model->length = position + 1;
  return 0;
}

/* Asking --------------------------------------------------------------------------------------------------------- */

int64_t dsmoe_batch(const dsmoe_model *model) { return (void)model, tables.batch; }
int64_t dsmoe_capacity(const dsmoe_model *model) { return (void)model, tables.capacity; }
int64_t dsmoe_vocabulary(const dsmoe_model *model) { return (void)model, tables.vocabulary; }
const char *dsmoe_level(const dsmoe_model *model) { return model->level->name; }
int64_t dsmoe_length(const dsmoe_model *model) { return model->length; }
const char *dsmoe_error(const dsmoe_model *model) { return model->error; }
