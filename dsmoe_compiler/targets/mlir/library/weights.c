/* weights/ *.safetensors as memory: mapped, and compared with what the library was compiled for. */
#define _GNU_SOURCE
#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define AGAIN "put the artifact's own file back, or compile the model again"

/* The first byte of a file that has the size it should have. */
static void *map_file(const File *file, const char *folder, char *error, size_t size) {
  char path[PATH_MAX];
  if (snprintf(path, sizeof path, "%s/weights/%s", folder, file->name) >= (int)sizeof path) {
    refuse(error, size, "the path of %s is longer than %d bytes", file->name, PATH_MAX);
    return NULL;
  }
  const int handle = open(path, O_RDONLY | O_CLOEXEC);
  if (handle < 0) {
    refuse(error, size, "%s cannot be opened: %s", path, strerror(errno));
    return NULL;
  }
  struct stat state;
  void *start = MAP_FAILED;
  if (fstat(handle, &state))
    refuse(error, size, "%s: %s", path, strerror(errno));
  else if (!S_ISREG(state.st_mode) || state.st_size != file->bytes)
    refuse(error, size, "%s has %lld bytes, the library was compiled for a file of %lld: " AGAIN, path,
           (long long)state.st_size, (long long)file->bytes);
  else if ((start = mmap(NULL, (size_t)file->bytes, PROT_READ, MAP_PRIVATE, handle, 0)) == MAP_FAILED)
    refuse(error, size, "%s cannot be mapped: %s", path, strerror(errno));
  close(handle);
  return start == MAP_FAILED ? NULL : start;
}

/* 8 bytes of length, then JSON: "name":{"dtype":...,"shape":[...],"data_offsets":[...]}, ... */
static int check_header(const File *file, const char *start, char *error, size_t size) {
  uint64_t length;
  memcpy(&length, start, sizeof length);
  if ((int64_t)length == file->header) return 0;
  return refuse(error, size, "weights/%s has a header of %llu bytes, the library was compiled for one of %lld: " AGAIN,
                file->name, (unsigned long long)length, (long long)file->header);
}

static int check_weight(const Weight *weight, const char *start, char *error, size_t size) {
  const File *file = &tables.files[weight->file];
  const char *header = start + 8;
  const size_t length = (size_t)file->header, wanted = strlen(weight->said);
  if (memmem(header, length, weight->said, wanted)) return 0;
  const char *brace = strstr(weight->said, ":{"); /* names are JSON text: none holds a plain quote */
  const char *found = memmem(header, length, weight->said, (size_t)(brace - weight->said) + 1);
  if (!found) return refuse(error, size, "weights/%s has no tensor %s: " AGAIN, file->name, weight->name);
  const char *end = memchr(found, '}', (size_t)(header + length - found));
  return refuse(error, size, "weights/%s has %.*s, the library was compiled for %s: " AGAIN, file->name,
                end ? (int)(end + 1 - found) : 0, found, weight->said);
}

/* Where the weight is; one that begins where its type may not is copied. */
static int place_weight(Weights *weights, int number, char *error, size_t size) {
  const Weight *weight = &tables.weights[number];
  char *place = (char *)weights->files[weight->file] + weight->offset;
  weights->addresses[number] = place;
  if (weight->offset % weight->item == 0) return 0;
  void *copy = NULL;
  if (posix_memalign(&copy, ALIGNMENT, (size_t)weight->bytes + ALIGNMENT))
    return refuse(error, size, "no memory for %lld bytes of %s", (long long)weight->bytes, weight->name);
  weights->copies[number] = weights->addresses[number] = memcpy(copy, place, (size_t)weight->bytes);
  return 0;
}

int map_weights(Weights *weights, const char *folder, char *error, size_t size) {
  const size_t count = (size_t)tables.weight_count + 1, files = (size_t)tables.file_count + 1;
  weights->addresses = calloc(count, sizeof(void *));
  weights->copies = calloc(count, sizeof(void *));
  weights->files = calloc(files, sizeof(void *));
  if (!weights->addresses || !weights->copies || !weights->files) return refuse(error, size, "no memory");
  for (int i = 0; i < tables.file_count; i++) {
    weights->files[i] = map_file(&tables.files[i], folder, error, size);
    if (!weights->files[i] || check_header(&tables.files[i], weights->files[i], error, size)) return -1;
  }
  for (int i = 0; i < tables.weight_count; i++) {
    if (check_weight(&tables.weights[i], weights->files[tables.weights[i].file], error, size)) return -1;
    if (place_weight(weights, i, error, size)) return -1;
  }
  return 0;
}

void unmap_weights(Weights *weights) {
  for (int i = 0; weights->copies && i < tables.weight_count; i++) free(weights->copies[i]);
  for (int i = 0; weights->files && i < tables.file_count; i++)
    if (weights->files[i]) munmap(weights->files[i], (size_t)tables.files[i].bytes);
  free(weights->addresses);
  free(weights->copies);
  free(weights->files);
}
