/* A compiled language model as a library of C: greedy text in five calls, without Python and without torch.
 *
 *     dsmoe_model *model = dsmoe_create("out/tiny", NULL, error, sizeof error);
 *     dsmoe_prefill(model, prompt, length, logits);
 *     dsmoe_decode(model, &token, dsmoe_length(model), logits);
 *     dsmoe_destroy(model);
 *
 * libmodel.so belongs to the artifact that it lies in: names, shapes and places of the weights are compiled in, the
 * weights themselves are mapped from the folder's weights/ (read-only, shared by processes, paged in when they are read).
 * Do not alter the folder while a model is open.
 *
 * Threads: OpenMP's (OMP_NUM_THREADS). A model belongs to one thread at a time; two models are independent.
 */
#ifndef DSMOE_MODEL_H
#define DSMOE_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsmoe_model dsmoe_model;

/* Open the artifact `folder`. `level` names the instructions to use ("avx2", "avx512"), NULL: the best ones that the
 * library holds and this processor can run. NULL is returned if that fails, and `error` (of `size` bytes) says why. */
dsmoe_model *dsmoe_create(const char *folder, const char *level, char *error, size_t size);

/* What it was compiled for. */
int64_t dsmoe_batch(const dsmoe_model *model);      /* sequences at a time */
int64_t dsmoe_capacity(const dsmoe_model *model);   /* positions of the cache: prompt and answer together */
int64_t dsmoe_vocabulary(const dsmoe_model *model); /* tokens are 0 .. vocabulary - 1; logits a token */
const char *dsmoe_level(const dsmoe_model *model);  /* the instructions in use */

/* How many positions of the cache are filled. */
int64_t dsmoe_length(const dsmoe_model *model);

/* Forget what was read and read a prompt: `ids` [batch, n], row after row; `logits` [batch, vocabulary] of what follows.
 * 0, or -1: dsmoe_error says why, and nothing has changed. */
int dsmoe_prefill(dsmoe_model *model, const int64_t *ids, int64_t n, float *logits);

/* Add one token a row, `tokens` [batch], at `position`, from 0. It is at most dsmoe_length: nothing is left out. What
 * stood there and after is forgotten. `logits` and the result are those of dsmoe_prefill. */
int dsmoe_decode(dsmoe_model *model, const int64_t *tokens, int64_t position, float *logits);

/* Why the last call failed; "" if it did not. Valid until the next call. */
const char *dsmoe_error(const dsmoe_model *model);

/* Give back all that the model holds. NULL is fine. */
void dsmoe_destroy(dsmoe_model *model);

#ifdef __cplusplus
}
#endif

#endif
