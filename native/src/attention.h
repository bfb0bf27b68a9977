// Causal softmax attention over paged keys and values (running maximum and sum per row as in
// FlashAttention, arXiv 2205.14135). Prompt and generated rows take the same path: the query heads of
// a group times the rows of a tile are the rows of two products per block of BK positions, whose keys
// and values are unpacked once. Blocks lie at fixed positions, and a block that is masked for a row
// leaves its running values as they were, so a row's bits do not depend on its tile.
#pragma once

#include <cmath>

#include "products.h"

namespace WL_NS {

constexpr int BK = 64;         // positions of a block
constexpr int BP = BK / NR;    // panels of a block
constexpr int64_t MQ = 64;     // rows of one item at most: tile rows times heads
constexpr float LOWEST = -1e30f;  // instead of -inf: differences of two masked rows stay finite

struct AttentionRound {
  const wl_attention *work;
  int64_t share, heads_per_item, items_per_tile;
};

/// One item's memory.
struct AttentionBench {
  float *queries, *scores, *weights, *out, *panel, *zeros, *top, *total, *fade;
  explicit AttentionBench(const wl_attention &a) {
    thread_local wl::Scratch scratch;
    const int64_t rows = MQ + W, width = std::max(a.keys.width, a.values.width) + 64;
    const int64_t v = num_panels(a.value_dim) * NR;
    queries = scratch.floats(rows * a.key_dim + 2 * rows * BK + rows * v + KC * NR + width + 3 * rows);
    scores = queries + rows * a.key_dim;
    weights = scores + rows * BK;
    out = weights + rows * BK;
    panel = out + rows * v;
    zeros = panel + KC * NR;
    top = zeros + width;
    total = top + rows;
    fade = total + rows;
    std::memset(zeros, 0, size_t(width) * 4);
  }
};

inline const uint8_t *cache_row(const wl_attention &a, const wl_cache &c, const wl_tile &t, int64_t head, int64_t position) {
  return static_cast<const uint8_t *>(c.data) + t.pages[position / a.page_tokens] * c.page_stride +
         head * c.head_stride + position % a.page_tokens * c.token_stride;
}

inline float cache_scale(const wl_attention &a, const wl_cache &c, const wl_tile &t, int64_t head, int64_t position) {
  const int64_t page = t.pages[position / a.page_tokens];
  return c.scales[(page * a.num_kv_heads + head) * a.page_tokens + position % a.page_tokens];
}

/// scores[panel][rows][NR] = queries times the keys of positions t0 .. t0 + BK.
inline void score(const wl_attention &a, const wl_tile &tile, int64_t head, int64_t t0, int64_t last, int64_t rows,
                  const AttentionBench &bench) {
  wl_matrix shape{};  // of a column's scale: one for all of k
  shape.block_k = a.key_dim;
  for (int p = 0; p < BP; p++) {
    float *c = bench.scores + p * rows * NR;
    const uint8_t *pointers[NR];
    float scales[2 * NR];
    for (int i = 0; i < NR; i++) {
      const int64_t t = t0 + p * NR + i;
      pointers[i] = t <= last ? cache_row(a, a.keys, tile, head, t) : reinterpret_cast<const uint8_t *>(bench.zeros);
      if (a.keys.scales) {
        scales[i] = t <= last ? cache_scale(a, a.keys, tile, head, t) : 0.0f;
        scales[NR + i] = 128.0f;
      }
    }
    for (int64_t k0 = 0; k0 < a.key_dim; k0 += KC) {
      const int count = int(std::min<int64_t>(KC, a.key_dim - k0));
      for (int v = 0; v < NV; v++) {
        const Groups groups{scales + v * W, scales + NR, 0};
        unpack_rows_of(a.keys.type, pointers + v * W, k0, count, bench.panel + v * W, &shape, groups);
      }
      multiply_panel<Exact>(bench.queries, rows, a.key_dim, k0, count, bench.panel, c, k0 == 0);
    }
  }
}

/// panel[BK][NR] = columns v0 .. v0 + NR of the values of positions t0 .. t0 + BK.
inline void unpack_values(const wl_attention &a, const wl_tile &tile, int64_t head, int64_t t0, int64_t last, int64_t v0, float *panel) {
  const wl_cache &c = a.values;
  for (int i = 0; i < BK; i++) {
    float *dst = panel + i * NR;
    const int64_t t = t0 + i;
    const uint8_t *row = t <= last ? cache_row(a, c, tile, head, t) : nullptr;
    for (int v = 0; v < NV; v++) {
      const int64_t at = v0 + v * W;
      V x = v_zero();
      if (row && at + W <= c.width) {
        switch (c.type) {
          case WL_F32: x = v_load(reinterpret_cast<const float *>(row) + at); break;
          case WL_BF16: x = load_bf16(row + 2 * at); break;
          case WL_F16: x = load_f16(row + 2 * at); break;
          default:
            x = v_mul(v_sub(to_float(load_bytes(row + at)), v_set(128.0f)), v_set(cache_scale(a, c, tile, head, t)));
        }
      }
      v_store(dst + v * W, x);
    }
  }
}

/// One block's new maximum, weights (in place of scores) and sum of a row at `position`.
inline void soften(const wl_attention &a, float *const row[BP], int64_t position, int64_t t0, float &top, float &total, float &fade) {
  const bool ragged = t0 + BK - 1 > position || (a.window && t0 <= position - a.window);
  if (ragged)
    for (int i = 0; i < BK; i++) {
      const int64_t t = t0 + i;
      if (t > position || (a.window && t <= position - a.window)) row[i / NR][i % NR] = -INFINITY;
    }
  V most = v_set(LOWEST);
  for (int p = 0; p < BP; p++)
    for (int v = 0; v < NV; v++) most = v_max(most, v_load(row[p] + v * W));
  const float held = top;
  const float new_top = std::max(v_top(most), held);
  V sum = v_zero();
  for (int p = 0; p < BP; p++)
    for (int v = 0; v < NV; v++) {
      V x = v_exp(v_sub(v_load(row[p] + v * W), v_set(new_top)));
      sum = v_add(sum, x);
      v_store(row[p] + v * W, x);
    }
  fade = 1.0f;
  if (new_top != held) {
    float lanes[W];
    v_store(lanes, v_exp(v_set(held - new_top)));
    fade = lanes[0];
  }
  total = total * fade + v_sum(sum);
  top = new_top;
}

/// All heads `first .. first + heads` of a group, all rows of a tile.
inline void attend_item(const wl_attention &a, const wl_tile &tile, int64_t group, int64_t first, int64_t heads, const AttentionBench &bench) {
  const int64_t rows = tile.num_rows * heads, d = a.key_dim, v = a.value_dim, panels = num_panels(v);
  const int64_t head0 = group * (a.num_heads / a.num_kv_heads) + first;
  const Blocks blocks{rows};
  // row r of the item is row r / heads of the tile and head r % heads
  for (int64_t b = 0; b < blocks.count(); b++) {
    const int64_t begin = blocks.begin(b);
    const int mr = blocks.size(b);
    float *dst = bench.queries + begin * d;
    const float *pointers[MR];
    for (int i = 0; i < mr; i++) {
      const int64_t r = begin + i;
      pointers[i] = a.q + ((tile.row + r / heads) * a.num_heads + head0 + r % heads) * d;
    }
    pack_rows(pointers, mr, d, dst);
    for (int64_t i = 0; i < mr * d; i++) dst[i] *= a.scale;
  }
  for (int64_t r = 0; r < rows; r++) {
    bench.top[r] = LOWEST;
    bench.total[r] = 0.0f;
  }
  std::memset(bench.out, 0, size_t(rows * panels * NR) * 4);
  const int64_t last = tile.position + tile.num_rows - 1;
  const int64_t oldest = a.window ? std::max<int64_t>(0, tile.position - a.window + 1) : 0;
  for (int64_t t0 = oldest / BK * BK; t0 <= last; t0 += BK) {
    score(a, tile, group, t0, last, rows, bench);
    for (int64_t r = 0; r < rows; r++) {
      float *row[BP];
      for (int p = 0; p < BP; p++) row[p] = bench.scores + (p * rows + r) * NR;
      soften(a, row, tile.position + r / heads, t0, bench.top[r], bench.total[r], bench.fade[r]);
      if (bench.fade[r] == 1.0f) continue;
      for (int64_t p = 0; p < panels; p++)
        for (int u = 0; u < NV; u++) {
          float *o = bench.out + (p * rows + r) * NR + u * W;
          v_store(o, v_mul(v_load(o), v_set(bench.fade[r])));
        }
    }
    for (int64_t b = 0; b < blocks.count(); b++) {
      const float *pointers[MR];
      const int64_t begin = blocks.begin(b);
      const int mr = blocks.size(b);
      for (int p = 0; p < BP; p++) {
        for (int i = 0; i < mr; i++) pointers[i] = bench.scores + (p * rows + begin + i) * NR;
        pack_rows(pointers, mr, NR, bench.weights + begin * BK + p * NR * mr);
      }
    }
    for (int64_t p = 0; p < panels; p++) {
      unpack_values(a, tile, group, t0, last, p * NR, bench.panel);
      multiply_panel<Exact>(bench.weights, rows, BK, 0, BK, bench.panel, bench.out + p * rows * NR, false);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = head0 + r % heads;
    float fade = 1.0f, total = bench.total[r];
    if (a.sinks) {
      const float top = std::max(bench.top[r], a.sinks[head]);
      float lanes[W];
      v_store(lanes, v_exp(v_set(bench.top[r] - top)));
      fade = lanes[0];
      v_store(lanes, v_exp(v_set(a.sinks[head] - top)));
      total = total * fade + lanes[0];
    }
    float *to = a.out + ((tile.row + r / heads) * a.num_heads + head) * v;
    for (int64_t i = 0; i < v; i++) to[i] = bench.out[(i / NR * rows + r) * NR + i % NR] * fade / total;
  }
}

inline void attention_task(wl::Team &team, int, void *context) {
  const AttentionRound &round = *static_cast<AttentionRound *>(context);
  const wl_attention &a = *round.work;
  AttentionBench bench(a);
  int64_t i;
  while ((i = team.next(a.num_tiles * round.items_per_tile)) >= 0) {
    const wl_tile &tile = a.tiles[i / round.items_per_tile];
    const int64_t item = i % round.items_per_tile, chunks = round.items_per_tile / a.num_kv_heads;
    const int64_t first = item % chunks * round.heads_per_item;
    const int64_t heads = std::min(round.heads_per_item, round.share - first);
    attend_item(a, tile, item / chunks, first, heads, bench);
  }
}

/// Tiles may have at most MQ rows; heads are split so that an item has at most MQ.
inline void attend(const wl_attention &a) {
  int64_t most = 1;
  for (int64_t i = 0; i < a.num_tiles; i++) most = std::max(most, a.tiles[i].num_rows);
  AttentionRound round{};
  round.work = &a;
  round.share = a.num_heads / a.num_kv_heads;
  round.heads_per_item = std::max<int64_t>(1, std::min(round.share, MQ / most));
  round.items_per_tile = a.num_kv_heads * ((round.share + round.heads_per_item - 1) / round.heads_per_item);
  wl::run_team(attention_task, &round);
}

}  // namespace WL_NS
