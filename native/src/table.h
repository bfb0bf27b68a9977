// The entry points of one instruction set.
#pragma once

#include "../include/windlass_cpu.h"

namespace wl {

/// Products of one kind of activations.
struct Products {
  void (*products)(const wl_product *, int64_t, int64_t);
  void (*experts)(const float *, int64_t, float *, int64_t, const wl_expert *, int64_t, int32_t, float, float);
};

struct Table {
  Products exact, bf16;
  void (*attend)(const wl_attention &);
  void (*rms_norm)(const float *, int64_t, float *, int64_t, int64_t, int64_t, const void *, int32_t, float, float);
  void (*combine)(const float *, const float *, const float *, const float *, float *, int64_t, int64_t, int64_t, float);
  void (*rotate)(float *, int64_t, int64_t, int64_t, int64_t, int64_t, const float *, const float *, int64_t, int32_t);
  void (*write_rows)(const float *, int64_t, int64_t, int64_t, int64_t, int64_t, const wl_cache &, const int64_t *, const int64_t *,
                     int64_t);
  void (*copy_rows)(const float *, int64_t, int64_t, int64_t, int64_t, int64_t, float *, int64_t, int64_t);
  void (*gate)(float *, int64_t, int64_t, const float *, bool);
  void (*route)(const float *, int64_t, int64_t, const wl_routing &, float *, int64_t *, float *);
  float (*read)(const uint8_t *, int64_t);
  void (*widen)(const wl_matrix &, float *);
};

extern const Table avx2_table, avx512_table;
extern const Products avx512_bf16_products, amx_products;

}  // namespace wl
