// A block of a sequence's keys and values: where its rows lie, and values times attention weights.
#pragma once

#include "products.h"

namespace WL_NS {

constexpr int BK = 64;         // positions of a block
constexpr int BP = BK / NR;    // panels of a block
constexpr int FEW_HEADS = W == 16 ? 8 : 6;  // rows of an item whose weights are multiplied without a panel of values

/// Where the rows of a block's positions lie; those after the last one point to zeros.
struct Places {
  const uint8_t *rows[BK];
  float scales[BK];

  void fill(const wl_attention &a, const wl_cache &c, const wl_tile &t, int64_t head, int64_t t0, int64_t last,
            const float *zeros) {
    const int valid = int(std::min<int64_t>(BK, last - t0 + 1));
    int64_t page = t0 / a.page_tokens, offset = t0 % a.page_tokens;
    for (int i = 0; i < valid; page++, offset = 0) {
      const int count = int(std::min<int64_t>(valid - i, a.page_tokens - offset));
      const uint8_t *row = static_cast<const uint8_t *>(c.data) + t.pages[page] * c.page_stride + head * c.head_stride +
                           offset * c.token_stride;
      for (int j = 0; j < count; j++) rows[i + j] = row + j * c.token_stride;
      if (c.scales) {
        const float *from = c.scales + (t.pages[page] * a.num_kv_heads + head) * a.page_tokens + offset;
        std::memcpy(scales + i, from, size_t(count) * sizeof(float));
      }
      i += count;
    }
    for (int i = valid; i < BK; i++) {
      rows[i] = reinterpret_cast<const uint8_t *>(zeros);
      scales[i] = 0.0f;
    }
  }

  /// `count` rows from `first` on, for `steps` steps of micro tiles to fetch.
  Ahead ahead(int first, int count, int64_t bytes, int64_t steps) const {
    return {rows + first, 0, count, int((count + steps - 1) / std::max<int64_t>(steps, 1)), int((bytes + 63) / 64)};
  }
};

/// W values of a row from column `at` on, zeros behind its end; `WHOLE`: it does not end among them.
template <int TYPE, bool WHOLE>
[[gnu::always_inline]] inline V load_values(const uint8_t *row, int64_t at, int64_t width, float scale) {
  const uint8_t *from = row + at * item_bytes(TYPE);
  alignas(64) uint8_t tail[W * 4];
  if (!WHOLE && at + W > width) {
    if (at >= width) return v_zero();
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, from, size_t((width - at) * item_bytes(TYPE)));
    from = tail;
  }
  if constexpr (TYPE == WL_F32) return v_load(reinterpret_cast<const float *>(from));
  else if constexpr (TYPE == WL_BF16) return load_bf16(from);
  else if constexpr (TYPE == WL_F16) return load_f16(from);
  else return v_mul(v_sub(to_float(load_bytes(from)), v_set(128.0f)), v_set(scale));
}

/// f<TYPE>() for the type of a cache.
template <class F>
inline void with_type(const wl_cache &c, F f) {
  switch (c.type) {
    case WL_F32: return f.template operator()<WL_F32>();
    case WL_BF16: return f.template operator()<WL_BF16>();
    case WL_F16: return f.template operator()<WL_F16>();
    case WL_INT8: return f.template operator()<WL_INT8>();
  }
}

/// panel[valid][NR] = columns v0 .. v0 + NR of the values of a block.
inline void unpack_values(const wl_cache &c, const Places &values, int valid, int64_t v0, float *panel) {
  with_type(c, [&]<int TYPE>() {
    auto all = [&]<bool WHOLE>() {
      for (int i = 0; i < valid; i++)
        for (int v = 0; v < NV; v++) {
          const V x = load_values<TYPE, WHOLE>(values.rows[i], v0 + v * W, c.width, values.scales[i]);
          v_store(panel + i * NR + v * W, x);
        }
    };
    if (v0 + NR <= c.width) all.template operator()<true>();
    else all.template operator()<false>();
  });
}

/// Fetches the rows of a block line by line, in the order in which they lie.
struct LinesOf {
  const Places *block;  // or none
  int64_t bytes;        // of a row
  int row = 0;
  int64_t offset = 0;
  void fetch(int64_t lines) {
    if (!block) return;
    for (; lines > 0 && row < BK; lines--) {
      fetch_line(block->rows[row] + offset);
      offset += 64;
      if (offset >= bytes) offset = 0, row++;
    }
  }
};

/// Weights of M rows times the values of `valid` positions.
template <int TYPE, int M>
struct FewHeads {
  const wl_cache &cache;
  const Places &values;
  int valid;
  const float *weights;  // [panel of positions][M][NR]
  float *out;            // [panel of columns][M][NR]

  /// Adds them to `C` vectors of columns from v0 on, in the order of tile_in_order.
  template <int C, bool WHOLE>
  [[gnu::always_inline]] inline void add(int64_t v0, LinesOf &next) const {
    V sum[M][C];
    for (int m = 0; m < M; m++)
      for (int u = 0; u < C; u++) sum[m][u] = v_zero();
    for (int first = 0; first < valid; first += NR) {
      const float *weight = weights + first * M;
      const int count = std::min(NR, valid - first);
      for (int i = 0; i < count; i++) {
        const uint8_t *row = values.rows[first + i];
        next.fetch((C * W * item_bytes(TYPE) + 63) / 64);
        V x[C];
        for (int u = 0; u < C; u++) x[u] = load_values<TYPE, WHOLE>(row, v0 + u * W, cache.width, values.scales[first + i]);
        for (int m = 0; m < M; m++) {
          const V by = v_set(weight[m * NR + i]);
          for (int u = 0; u < C; u++) sum[m][u] = v_fma(by, x[u], sum[m][u]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int u = 0; u < C; u++) {
        float *to = out + ((v0 / W + u) / NV * M + m) * NR + (v0 / W + u) % NV * W;
        v_store(to, v_add(v_load(to), sum[m][u]));
      }
  }

  void add_all(int64_t width, const Places *then) const {
    LinesOf next{then, width * item_bytes(TYPE)};
    constexpr int WIDE = W == 16 ? (M <= 2 ? 8 : M <= 4 ? 4 : 2) : M == 1 ? 8 : M == 2 ? 4 : 2;
    int64_t v0 = 0;
    for (; v0 + WIDE * W <= width; v0 += WIDE * W) add<WIDE, true>(v0, next);
    for (; v0 + NR <= width; v0 += NR) add<NV, true>(v0, next);
    if (v0 < width) add<NV, false>(v0, next);
  }
};

/// out[panel of columns][rows][NR] += weights [panel of positions][rows][NR] of `rows` rows, at most FEW_HEADS,
/// times the values of a block.
inline void add_values(const wl_cache &c, const Places &values, const Places *next, int valid, int64_t rows,
                       const float *weights, int64_t width, float *out) {
  with_type(c, [&]<int TYPE>() {
    auto few = [&]<int M>() { FewHeads<TYPE, M>{c, values, valid, weights, out}.add_all(width, next); };
    with_rows<FEW_HEADS>(rows, few);
  });
}

}  // namespace WL_NS
