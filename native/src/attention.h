// Causal softmax attention over paged keys and values (running maximum and sum per row as in
// FlashAttention, arXiv 2205.14135). Prompt and generated rows take the same path: the query heads of
// a group times the rows of a tile are the rows of two products per block of BK positions, whose keys
// and values are unpacked once. Blocks lie at fixed positions, and a block that is masked for a row
// leaves its running values as they were, so a row's bits do not depend on its tile.
#pragma once

#include <cmath>

#include "kv_block.h"

namespace WL_NS {

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
    const int64_t v = num_items(a.value_dim, 1) * NR;
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

/// scores[panel][rows][NR] = queries times the keys of a block.
/// Panels of which no position is `valid` are left as they are: all of their scores are masked.
inline void score(const wl_attention &a, const Places &keys, int valid, const Places *next, int64_t rows,
                  const AttentionBench &bench) {
  wl_matrix shape{};  // of a column's scale: one for all of k
  shape.code = a.keys.type;
  shape.block_k = a.key_dim;
  float zeros[W] = {};  // looked up, not used: the codes' own zero
  const int codes = codes_per_word(a.keys.type);
  const Steps steps{codes, W * codes};
  const int panels = (valid + NR - 1) / NR;
  for (int p = 0; p < panels; p++)
    for (int64_t k0 = 0; k0 < a.key_dim; k0 += KC) {
      const int count = int(std::min<int64_t>(KC, a.key_dim - k0));
      for (int v = 0; v < NV; v++) {
        const int first = p * NR + v * W;
        Groups groups;
        groups.scale = const_cast<float *>(keys.scales) + first;
        groups.zero = zeros;
        unpack_rows_of(keys.rows + first, k0, count, bench.panel + v * W, steps, shape, groups);
      }
      Ahead ahead;
      if (next && k0 == 0) {
        const int from = p * BK / panels, num = (p + 1) * BK / panels - from;
        ahead = next->ahead(from, num, a.key_dim * item_bytes(a.keys.type), count / KSTEP);
      }
      multiply_in_order(bench.queries, rows, a.key_dim, k0, count, bench.panel, bench.scores + p * rows * NR, k0 == 0, ahead);
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

/// Some heads of a group, `first .. first + heads`, and all rows of a tile.
struct Item {
  const wl_tile *tile;
  int64_t group, first, heads;
  int64_t last() const { return tile->position + tile->num_rows - 1; }
  /// Position at which the first block begins that a row sees.
  int64_t begin(const wl_attention &a) const {
    return a.window ? std::max<int64_t>(0, tile->position - a.window + 1) / BK * BK : 0;
  }
};

/// Keys and values of the block that is computed and of the one after, which is fetched meanwhile.
struct Pipeline {
  Places keys[2], values[2];
  int now = 0;
  bool shared;  // latent attention: values are part of the keys
  explicit Pipeline(const wl_attention &a) : shared(a.values.data == a.keys.data) {}
  void find(const wl_attention &a, const Item &item, int64_t t0, int at, const float *zeros) {
    keys[at].fill(a, a.keys, *item.tile, item.group, t0, item.last(), zeros);
    if (!shared) values[at].fill(a, a.values, *item.tile, item.group, t0, item.last(), zeros);
  }
};

/// `pipeline` holds the item's first block, and then that of the item `after`, where there is one.
inline void attend_item(const wl_attention &a, const Item &item, const Item *after, Pipeline &pipeline,
                        const AttentionBench &bench) {
  const wl_tile &tile = *item.tile;
  const int64_t group = item.group, first = item.first, heads = item.heads;
  const int64_t rows = tile.num_rows * heads, d = a.key_dim, v = a.value_dim, panels = num_items(v, 1);
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
  const int64_t last = item.last();
  for (int64_t t0 = item.begin(a); t0 <= last; t0 += BK, pipeline.now ^= 1) {
    const int now = pipeline.now, then = now ^ 1, valid = int(std::min<int64_t>(BK, last - t0 + 1));
    const bool own = t0 + BK <= last, more = own || after;
    if (more) pipeline.find(a, own ? item : *after, own ? t0 + BK : after->begin(a), then, bench.zeros);
    score(a, pipeline.keys[now], valid, more ? &pipeline.keys[then] : nullptr, rows, bench);
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
    const Places &values = pipeline.shared ? pipeline.keys[now] : pipeline.values[now];
    const Places *next = more && !pipeline.shared ? &pipeline.values[then] : nullptr;
    if (rows <= FEW_HEADS) {
      add_values(a.values, values, next, valid, rows, bench.scores, v, bench.out);
      continue;
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
      unpack_values(a.values, values, valid, p * NR, bench.panel);
      Ahead ahead;
      if (next) {
        const int per_panel = int((BK + panels - 1) / panels), from = int(p) * per_panel;
        const int num = std::max(0, std::min(per_panel, BK - from));
        ahead = next->ahead(from, num, v * item_bytes(a.values.type), valid / KSTEP);
      }
      multiply_in_order(bench.weights, rows, BK, 0, valid, bench.panel, bench.out + p * rows * NR, false, ahead);
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
    for (int64_t i = 0; i < v; i += W) {
      const V x = v_div(v_mul(v_load(bench.out + (i / NR * rows + r) * NR + i % NR), v_set(fade)), v_set(total));
      store_some(to + i, as_int(x), int(std::min<int64_t>(W, v - i)));
    }
  }
}

inline void attention_task(wl::Team &team, int, void *context) {
  const AttentionRound &round = *static_cast<AttentionRound *>(context);
  const wl_attention &a = *round.work;
  AttentionBench bench(a);
  Pipeline pipeline(a);
  auto take = [&](Item &item) {
    const int64_t i = team.next(a.num_tiles * round.items_per_tile);
    if (i < 0) return false;
    const int64_t at = i % round.items_per_tile, chunks = round.items_per_tile / a.num_kv_heads;
    const int64_t first = at % chunks * round.heads_per_item;
    item = {a.tiles + i / round.items_per_tile, at / chunks, first, std::min(round.heads_per_item, round.share - first)};
    return true;
  };
  Item item, after;
  if (!take(item)) return;
  pipeline.find(a, item, item.begin(a), pipeline.now, bench.zeros);
  while (true) {
    const bool more = take(after);
    attend_item(a, item, more ? &after : nullptr, pipeline, bench);
    if (!more) return;
    item = after;
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
