/* What the parts of libmodel.so know of each other. tables.c is written for each model, the rest is the same for all. */
#ifndef DSMOE_INSIDE_H
#define DSMOE_INSIDE_H

#include <stddef.h>
#include <stdint.h>

enum { ALIGNMENT = 64 }; /* bytes of a cache line */

/* A file of weights: its size, and that of its header. */
typedef struct {
  const char *name;
  int64_t bytes, header;
} File;

/* A weight: where it lies, and the text of the file's header that must be about it. */
typedef struct {
  const char *name, *said;
  int file;
  int64_t offset, bytes, item;
} Weight;

/* Where the address of an argument comes from; `number` counts weights, caches or outputs. */
typedef enum { WEIGHT, IDS, POSITION, CACHE, OUTPUT } Kind;

typedef struct {
  Kind kind;
  int number;
} Argument;

typedef enum { FLOAT32, BFLOAT16, FLOAT16 } Format;

/* How logits [batch, vocabulary] lie in the output that holds them. */
typedef struct {
  int64_t offset, row, column;
} Place;

/* A program. `measure` gives, for prompts of n tokens, its free dimensions, the bytes of its outputs, and its logits. */
typedef struct {
  const char *name;
  const Argument *arguments;
  int count, outputs, sizes;
  int logits; /* the output that holds them */
  Format format;
  void (*measure)(int64_t n, int64_t *sizes, int64_t *bytes, Place *logits);
} Phase;

typedef struct {
  void (*run)(void **data, int64_t *sizes);
  int64_t (*workspace)(int64_t *sizes);
} Code;

/* Both programs for one set of instructions; `features` ends with NULL. */
typedef struct {
  const char *name;
  const char *const *features;
  Code prefill, decode;
} Level;

typedef struct {
  int64_t batch, capacity, vocabulary;
  const File *files;
  const Weight *weights;
  const int64_t *caches; /* bytes of each */
  const Level *levels;   /* the least first */
  int file_count, weight_count, cache_count, level_count;
  Phase prefill, decode;
} Tables;

extern const Tables tables;

/* An error as text, cut to its buffer. Always -1. */
int refuse(char *error, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The first of `features`, named as Linux names them, that this processor or system lacks; NULL: all are there. */
const char *missing_feature(const char *const *features);

/* The level of that name, or the best one that can run here. NULL: none, and `error` says why. */
const Level *choose_level(const char *name, char *error, size_t size);

/* Weights in memory that is the files. */
typedef struct {
  void **addresses; /* of each weight */
  void **files;     /* of each file's first byte, NULL: not mapped */
  void **copies;    /* of each weight that cannot lie where the file has it, else NULL */
} Weights;

/* 0, or -1: something does not fit, and `error` names it. `unmap_weights` gives back what there is, either way. */
int map_weights(Weights *weights, const char *folder, char *error, size_t size);
void unmap_weights(Weights *weights);

#endif
