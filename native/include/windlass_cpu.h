/* C interface of the CPU kernels. Pointers, sizes and strides; no library types.
 *
 * Activations are fp32. A weight matrix is described by wl_matrix and stays as it is stored.
 * Every result of one row depends on that row and the weights alone: sums over the inner dimension
 * run in blocks at fixed positions, each of chains of fused multiply-adds at fixed places, so
 * neither other rows, nor threads, nor the cut into calls can change a bit.
 *
 * Shape letters: T rows of a call, D inner width, N output features, H query heads, K key/value
 * heads, d key width, v value width. Functions return 0, or a WL_E code. */
#ifndef WINDLASS_CPU_H
#define WINDLASS_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define WL_ABI_VERSION 6
#define WL_API __attribute__((visibility("default")))

enum { WL_OK = 0, WL_E_ARGUMENT = 1, WL_E_MEMORY = 2 };

/* How one code is stored. Two 4-bit codes share a byte, the lower nibble first. */
enum wl_code {
  WL_F32 = 0,
  WL_BF16 = 1,
  WL_F16 = 2,
  WL_E4M3 = 3,  /* fp8: 1 sign, 4 exponent, 3 mantissa bits; 0x7f and 0xff are NaN */
  WL_E2M1 = 4,  /* fp4 of MXFP4 */
  WL_INT8 = 5,  /* value + 128 in a byte (compressed-tensors) */
  WL_INT4 = 6,  /* value + 8 in a nibble, of int4 "rows"; plain 0..15 elsewhere */
};

/* Where the code of (n, k) lies. */
enum wl_packing {
  WL_ROWS = 0,  /* codes + n * stride_n + k * stride_k bytes; 4-bit: stride_k is ignored, k / 2 */
  WL_GPTQ = 1,  /* int32 words [k / 8][n], nibble k % 8 */
  WL_AWQ = 2,   /* int32 words [k][n / 8], nibble (0, 4, 1, 5, 2, 6, 3, 7)[n % 8] */
  WL_GPTQ8 = 3, /* int32 words [k / 4][n], byte k % 4 */
};

enum wl_scale { WL_S_NONE = 0, WL_S_F32 = 1, WL_S_BF16 = 2, WL_S_F16 = 3, WL_S_E8M0 = 4 };

/* Zero points, one for each scale. */
enum wl_zero {
  WL_Z_NONE = 0,  /* the format's own: 8 or 128 for offset-binary codes, else 0 */
  WL_Z_ROWS = 1,  /* compressed-tensors: packed along n, like the codes: int32 [n / c][group] */
  WL_Z_GPTQ = 2,  /* int32 [group][n / c], nibble or byte n % c, plus zero_add (modulo its range) */
  WL_Z_AWQ = 3,   /* int32 [group][n / 8], nibbles like the codes */
};

/* One matrix (n, k): weight = (code - zero) * scale, scale and zero of its block of
 * block_n x block_k elements (of group groups[k], where `groups` is given). Strides of codes are in
 * bytes; of scales in elements; zeros are read with zero_stride int32 words between rows. */
typedef struct wl_matrix {
  int32_t code, packing, scale_type, zero_type;
  int64_t n, k;
  const void *codes;
  int64_t stride_n, stride_k;
  const void *scales;
  int64_t scale_stride_n, scale_stride_k;
  int64_t block_n, block_k;
  const void *zeros;
  int64_t zero_stride, zero_add;
  const int32_t *groups;
} wl_matrix;

/* out[t] = w x[t] + bias for all rows t; `x` and `out` have row strides in floats. Products that
 * follow each other with the same x share its packed rows. bias: fp32 (n) or null. */
typedef struct wl_product {
  const float *x;
  int64_t ldx;
  const wl_matrix *w;
  const float *bias;
  float *out;
  int64_t ldo;
} wl_product;

/* One expert and its rows: row rows[i] of x goes through gate, up, activation and down to row
 * places[i] of out. Null rows or places: 0, 1, 2, ... Biases are fp32 or null. The gate is null where
 * the activation has none. */
typedef struct wl_expert {
  const wl_matrix *gate, *up, *down;
  const float *gate_bias, *up_bias, *down_bias;
  const int64_t *rows, *places;
  int64_t num_rows;
} wl_expert;

enum wl_activation {
  WL_SWIGLU = 0,         /* silu(gate) * up */
  WL_CLAMPED_SWIGLU = 1, /* GPT-OSS: gate <= limit, |up| <= limit, (up + 1) gate sigmoid(alpha gate) */
  WL_GEGLU = 2,          /* gelu(gate) * up, gelu in its tanh form */
  WL_RELU_SQUARED = 3,   /* max(0, up)^2, no gate */
};

/* Rows of one sequence that attend together: consecutive rows and positions. */
typedef struct wl_tile {
  int64_t row, num_rows, position;
  const int64_t *pages; /* of the sequence, oldest first */
} wl_tile;

/* Paged keys or values: element (page, head, token, i) lies at data + page * page_stride +
 * head * head_stride + token * token_stride bytes. With WL_INT8 a code means (code - 128) *
 * scales[(page * heads + head) * page_tokens + token]. */
typedef struct wl_cache {
  void *data;
  int64_t page_stride, head_stride, token_stride;
  int64_t width;        /* elements of a row that can be read */
  int32_t type;         /* WL_F32, WL_BF16, WL_F16 or WL_INT8 */
  float *scales;        /* of WL_INT8 */
} wl_cache;

/* Causal softmax attention (grouped queries): q (T, H, d) and out (T, H, v), contiguous. */
typedef struct wl_attention {
  const float *q;
  float *out;
  int64_t num_heads, num_kv_heads, key_dim, value_dim;
  float scale;
  int64_t window;     /* positions that a query sees, itself included; 0: all */
  const float *sinks; /* (H) or null: one more logit in the denominator */
  int64_t page_tokens;
  wl_cache keys, values;
  const wl_tile *tiles;
  int64_t num_tiles;
} wl_attention;

/* What becomes of the logits of a router. WL_LOGITS: the chosen ones go through a softmax. */
enum wl_score { WL_SOFTMAX = 0, WL_SIGMOID = 1, WL_LOGITS = 2 };

/* What chosen scores are divided by: nothing; max(sum, norm_by); max(sqrt(sum of squares), norm_by);
 * sum + norm_by. */
enum wl_norm { WL_N_NONE = 0, WL_N_SUM = 1, WL_N_EUCLID = 2, WL_N_PLUS = 3 };

typedef struct wl_routing {
  int32_t score, norm;
  float norm_by, scale;
  int64_t top_k;
  int64_t num_groups, kept_groups; /* 0: all experts can be chosen */
  int32_t rank_by_two;             /* a group's rank is the sum of its best two, else its best */
  const float *bias;               /* (experts) or null: added to the scores for the choice only */
  const float *factors;            /* (experts) or null: the weight of an expert is times its own */
} wl_routing;

WL_API int32_t wl_abi_version(void);
/* Names of the instruction sets that this library has and this machine can run, best last, comma
 * separated; and the one in use. `wl_use` chooses one, by name; not while a call runs. */
WL_API const char *wl_available(void);
WL_API const char *wl_in_use(void);
WL_API int32_t wl_use(const char *name);
/* Threads of all calls, the caller's included. */
WL_API int32_t wl_set_threads(int32_t threads);
WL_API int32_t wl_get_threads(void);

/* What products multiply: activations as they are (fp32), or bf16 activations, with sums in fp32 either
 * way. Where the processor multiplies bf16, weights of other types are rounded to bf16 too. */
enum wl_precision { WL_FP32_ACTIVATIONS = 0, WL_BF16_ACTIVATIONS = 1 };

WL_API int32_t wl_products(const wl_product *products, int64_t num, int64_t num_rows, int32_t precision);
WL_API int32_t wl_experts(const float *x, int64_t ldx, float *out, int64_t ldo, const wl_expert *experts,
                          int64_t num, int32_t activation, float alpha, float limit,
                          int32_t precision);
/* The same for rows that `wl_group` sorted: expert e of num has the next counts[e] of rows and places. Rows
 * of an expert that is null in the table are left alone. */
WL_API int32_t wl_routed(const float *x, int64_t ldx, float *out, int64_t ldo, const wl_expert *const *table,
                         int64_t num, const int64_t *counts, const int64_t *rows, const int64_t *places,
                         int32_t activation, float alpha, float limit, int32_t precision);
WL_API int32_t wl_attend(const wl_attention *work);
/* y = x / rms(x) * (weight + add), over the last dimension; weight fp32 or, with type, as stored. */
WL_API int32_t wl_rms_norm(const float *x, int64_t ldx, float *y, int64_t ldy, int64_t num_rows,
                           int64_t width, const void *weight, int32_t weight_type, float add, float eps);
/* out[t] = residual[t] + multiplier * (shared[t] + sum over a of weights[t, a] * outputs[t, a]);
 * shared and residual may be null; so may outputs and weights, with per_row 0. */
WL_API int32_t wl_combine(const float *outputs, const float *weights, const float *shared,
                          const float *residual, float *out, int64_t num_rows, int64_t per_row,
                          int64_t width, float multiplier);
/* Rotates the first 2 * pairs elements of each head of x (T, H, d; strides in floats) in place. */
WL_API int32_t wl_rotate(float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows,
                         int64_t num_heads, int64_t pairs, const float *cos, const float *sin,
                         int64_t table_stride, int32_t interleaved);
/* Row t of x (T, H, width; strides in floats) to head by head of the cache, at offsets[t] of page
 * pages[t]; rounded to its type. With WL_INT8 a row's largest magnitude is 127 steps. */
WL_API int32_t wl_write_rows(const float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows,
                             int64_t num_heads, int64_t width, const wl_cache *cache, const int64_t *pages,
                             const int64_t *offsets, int64_t page_tokens);
/* Copies x (T, H, width) to out; strides in floats. */
WL_API int32_t wl_copy_rows(const float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows,
                            int64_t num_heads, int64_t width, float *out, int64_t out_row_stride,
                            int64_t out_head_stride);
/* x (T, width) times the sigmoid of gate: (T, width), or (T) if one_of_row; in place. */
WL_API int32_t wl_gate(float *x, int64_t num_rows, int64_t width, const float *gate, int32_t one_of_row);
/* The best top_k experts of each row, best first, of equal ones the lower; logits (T, experts), weights and
 * ids (T, top_k). scores: null, or (T, experts) for what became of all logits, without the bias. */
WL_API int32_t wl_route(const float *logits, int64_t num_rows, int64_t num_experts, const wl_routing *routing,
                        float *weights, int64_t *ids, float *scores);
/* Places 0 .. num in the order of the expert that ids[place] names, stable: order[i] is a place, rows[i]
 * its row, place / per_row; counts[e] places have expert e of num_experts. */
WL_API int32_t wl_group(const int64_t *ids, int64_t num, int64_t per_row, int64_t num_experts, int64_t *order,
                        int64_t *rows, int64_t *counts);
/* Reads `num_bytes` once by all threads, as fast as memory gives them: what products of few rows are
 * measured against. `sum` is of no use but to need them. */
WL_API int32_t wl_read(const void *data, int64_t num_bytes, float *sum);
/* A call of the function above that `function` names, with its arguments in order. */
enum wl_function {
  WL_RUN_PRODUCTS = 0, WL_RUN_EXPERTS = 1, WL_RUN_ATTEND = 2, WL_RUN_RMS_NORM = 3, WL_RUN_COMBINE = 4,
  WL_RUN_ROTATE = 5, WL_RUN_WRITE_ROWS = 6, WL_RUN_ROUTE = 7, WL_RUN_GROUP = 8,
  WL_RUN_ROUTED = 9, WL_RUN_COPY_ROWS = 10, WL_RUN_GATE = 11,
};
typedef union wl_argument {
  const void *p;
  int64_t i;
  double f;
} wl_argument;
typedef struct wl_call {
  int32_t function, label;
  wl_argument arguments[13];
} wl_call;

/* All calls, one after the other, up to the first that fails; the seconds of each are added to
 * seconds[label]. */
WL_API int32_t wl_run(const wl_call *calls, int64_t num, double *seconds);
/* fp32 copy of a matrix: out (n, k). For tests. */
WL_API int32_t wl_widen(const wl_matrix *w, float *out);

#ifdef __cplusplus
}
#endif
#endif
