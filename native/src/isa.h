// Everything, compiled for the instruction set of the including file, as one table.
#pragma once

#include "attention.h"
#include "route.h"
#include "table.h"

namespace WL_NS {

inline void widen(const wl_matrix &m, float *out) {
  wl::Scratch memory;
  float *panel = memory.floats(KC * NR + group_floats(m));
  for (int64_t n0 = 0; n0 < m.n; n0 += NR)
    for (int64_t k0 = 0; k0 < m.k; k0 += KC) {
      const int count = int(std::min<int64_t>(KC, m.k - k0));
      unpack_panel(m, n0, k0, count, panel, panel + KC * NR, Chains{0});
      for (int64_t n = n0; n < std::min(m.n, n0 + NR); n++)
        for (int k = 0; k < count; k++) out[n * m.k + k0 + k] = panel[k * NR + n - n0];
    }
}

constexpr wl::Table make_table() {
  return {
      {products<Exact>, experts<Exact>},
      {products<Bf16>, experts<Bf16>},
      attend,
      [](const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows, int64_t width, const void *w, int32_t type,
         float add, float eps) { rms_norm({x, ldx, y, ldy, rows, width, w, type, add, eps}); },
      [](const float *o, const float *w, const float *s, const float *r, float *out, int64_t rows, int64_t per_row,
         int64_t width, float multiplier) { combine({o, w, s, r, out, rows, per_row, width, multiplier}); },
      [](float *x, int64_t row, int64_t head, int64_t rows, int64_t heads, int64_t pairs, const float *cos,
         const float *sin, int64_t stride, int32_t interleaved) {
        rotate({x, row, head, rows, heads, pairs, cos, sin, stride, interleaved});
      },
      [](const float *x, int64_t row, int64_t head, int64_t rows, int64_t heads, int64_t width, const wl_cache &cache,
         const int64_t *pages, const int64_t *offsets, int64_t page_tokens) {
        write_rows({x, row, head, rows, heads, width, cache, pages, offsets, page_tokens});
      },
      [](const float *x, int64_t row, int64_t head, int64_t rows, int64_t heads, int64_t width, float *out, int64_t out_row,
         int64_t out_head) { copy_rows({x, row, head, rows, heads, width, out, out_row, out_head}); },
      [](float *x, int64_t rows, int64_t width, const float *by, bool one_of_row) { gate({x, rows, width, by, one_of_row}); },
      [](const float *logits, int64_t rows, int64_t experts, const wl_routing &r, float *weights, int64_t *ids,
         float *scores) { route({logits, rows, experts, r, weights, ids, scores}); },
      read_all,
      widen,
  };
}

}  // namespace WL_NS
