/* C interface of the CPU kernels. Pointers, sizes and strides; no library types.
 *
 * Activations are fp32. A weight matrix is described by wl_matrix and stays as it is stored.
 * Every result of one row depends on that row and the weights alone: sums over the inner dimension
 * run in blocks at fixed positions, each a sequence of fused multiply-adds in ascending order, so
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

#define WL_ABI_VERSION 1
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
  WL_AWQ = 2,   /* int32 words [k][n / 8], nibble AWQ_ORDER[n % 8] */
  WL_GPTQ8 = 3, /* int32 words [k / 4][n], byte k % 4 */
};

enum wl_scale { WL_S_NONE = 0, WL_S_F32 = 1, WL_S_BF16 = 2, WL_S_F16 = 3, WL_S_E8M0 = 4 };

/* Zero points, one for each scale. */
enum wl_zero {
  WL_Z_NONE = 0,  /* the format's own: 8 or 128 for offset-binary codes, else 0 */
  WL_Z_ROWS = 1,  /* compressed-tensors: packed along n, like the codes: int32 [n / c][group] */
  WL_Z_GPTQ = 2,  /* int32 [group][n / c], nibble or byte n % c; stored less one where zero_add */
  WL_Z_AWQ = 3,   /* int32 [group][n / 8], nibble AWQ_ORDER[n % 8] */
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

#ifdef __cplusplus
}
#endif
#endif
