// Dense products and expert networks over gathered rows: phases that all threads go through together.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"
#include "pool.h"
#include "scratch.h"

namespace WL_NS {

constexpr int64_t MC = 512;                 // rows packed at once: their panel results stay in the cache
constexpr int64_t ROUND_FLOATS = 1 << 20;   // packed rows and hidden rows of one round: they stay in the last-level cache

/// A thread's own: a panel, scales of a matrix, results of two panels.
struct Bench {
  float *panel, *groups, *first, *second;
  explicit Bench(int64_t group_floats) {
    thread_local wl::Scratch scratch;
    constexpr int64_t panel_floats = std::max<int64_t>(KC * NR, LANE_FLOATS);
    panel = scratch.floats(panel_floats + 2 * MC * NR + group_floats);
    first = panel + panel_floats;
    second = first + MC * NR;
    groups = second + MC * NR;
  }
};

/// Where item `i` of a list of lists lies: `ends` are running totals.
inline std::pair<int64_t, int64_t> locate(const std::vector<int64_t> &ends, int64_t i) {
  const int64_t list = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
  return {list, i - (list ? ends[size_t(list) - 1] : 0)};
}

/// Columns of n in items of `panels` panels.
inline int64_t num_items(int64_t n, int panels) { return (n + panels * NR - 1) / (panels * NR); }

/// Block `b` of rows `first + i` (of `rows`, where given) of x into `packed`, to be multiplied by m.
template <class Mode>
inline void pack_block(const float *x, int64_t ldx, const int64_t *rows, int64_t first, Blocks blocks,
                       int64_t b, const wl_matrix &m, float *packed) {
  const float *pointers[MR];
  const int mr = blocks.size(b);
  for (int i = 0; i < mr; i++) {
    const int64_t row = first + blocks.begin(b) + i;
    pointers[i] = x + (rows ? rows[row] : row) * ldx;
  }
  Layout<Mode>(m, blocks.rows).pack(pointers, blocks, b, {0, m.k, m.k}, packed);
}

inline void write_panel(const float *c, int64_t rows, int64_t n0, int64_t n, const float *bias, float *out,
                        int64_t ldo, const int64_t *places, int64_t first) {
  const int64_t count = std::min<int64_t>(NR, n - n0);
  for (int64_t i = 0; i < rows; i++) {
    float *to = out + (places ? places[first + i] : first + i) * ldo + n0;
    const float *from = c + i * NR;
    if (count == NR) {
      for (int v = 0; v < NV; v++) {
        V y = v_load(from + v * W);
        v_store(to + v * W, bias ? v_add(y, v_load(bias + n0 + v * W)) : y);
      }
    } else {
      for (int64_t j = 0; j < count; j++) to[j] = bias ? from[j] + bias[n0 + j] : from[j];
    }
  }
}

/// Panels c[panel][rows][NR], of columns n0 and following.
inline void write_panels(const float *c, int panels, int64_t rows, int64_t n0, int64_t n, const float *bias, float *out,
                         int64_t ldo, const int64_t *places, int64_t first) {
  for (int p = 0; p < panels && n0 + p * NR < n; p++)
    write_panel(c + p * rows * NR, rows, n0 + p * NR, n, bias, out, ldo, places, first);
}

// --- dense products -------------------------------------------------------------------------------

struct ProductRound {
  const wl_product *products;
  int64_t first_row, num_rows, max_groups;
  std::vector<int64_t> packs;       // index of the product whose rows a pack is
  std::vector<int64_t> pack_of;     // of each product
  std::vector<float *> packed;      // of each pack
  std::vector<int64_t> ends;        // running totals of items, by product
};

template <class Mode>
inline void product_task(wl::Team &team, int thread, void *context) {
  const ProductRound &round = *static_cast<ProductRound *>(context);
  const Blocks blocks{round.num_rows};
  const int64_t num_blocks = blocks.count();
  int64_t i;
  while ((i = team.next(num_blocks * int64_t(round.packs.size()))) >= 0) {
    const size_t pack = size_t(i / num_blocks);
    const wl_product &p = round.products[round.packs[pack]];
    pack_block<Mode>(p.x, p.ldx, nullptr, round.first_row, blocks, i % num_blocks, *p.w, round.packed[pack]);
  }
  auto fetch = [&](int64_t i) {
    if (i == round.ends.back()) return;
    const auto [index, item] = locate(round.ends, i);
    const wl_matrix &m = *round.products[index].w;
    const Layout<Mode> layout(m, round.num_rows);
    fetch_start(m, item * layout.panels() * NR, layout);
  };
  fetch(team.first_beside(thread, round.ends.back()));
  team.barrier();
  Bench bench(round.max_groups);
  while ((i = team.next_beside(thread, round.ends.back())) >= 0) {
    const auto [index, item] = locate(round.ends, i);
    if (i + 1 == round.ends[size_t(index)]) fetch(i + 1);
    const wl_product &p = round.products[index];
    const float *packed = round.packed[size_t(round.pack_of[size_t(index)])];
    const int panels = Layout<Mode>(*p.w, round.num_rows).panels();
    const int64_t n0 = item * panels * NR;
    multiply_columns<Mode>(*p.w, n0, panels, packed, round.num_rows, bench.panel, bench.groups, bench.first);
    write_panels(bench.first, panels, round.num_rows, n0, p.w->n, p.bias, p.out, p.ldo, nullptr, round.first_row);
  }
}

template <class Mode>
inline void products(const wl_product *all, int64_t num, int64_t num_rows) {
  static thread_local wl::Scratch scratch;
  for (int64_t row = 0; row < num_rows; row += MC) {
    const int64_t rows = std::min(MC, num_rows - row);
    for (int64_t begin = 0, end; begin < num; begin = end) {
      ProductRound round{};
      round.products = all + begin;
      round.first_row = row;
      round.num_rows = rows;
      int64_t floats = 0, items = 0;
      std::vector<int64_t> offsets;
      for (end = begin; end < num; end++) {
        const wl_product &p = all[end];
        const Layout<Mode> layout(*p.w, rows);
        const bool shared = end > begin && p.x == all[end - 1].x && p.ldx == all[end - 1].ldx && p.w->k == all[end - 1].w->k &&
                            layout == Layout<Mode>(*all[end - 1].w, rows);
        if (!shared) {
          const int64_t size = rows * layout.width(p.w->k);
          if (end > begin && floats + size > ROUND_FLOATS) break;
          round.packs.push_back(end - begin);
          offsets.push_back(floats);
          floats += (size + 15) / 16 * 16;
        }
        round.pack_of.push_back(int64_t(round.packs.size()) - 1);
        round.ends.push_back(items += num_items(p.w->n, layout.panels()));
        round.max_groups = std::max(round.max_groups, layout.scratch_floats(*p.w));
      }
      float *memory = scratch.floats(floats);
      for (int64_t offset : offsets) round.packed.push_back(memory + offset);
      wl::run_team(product_task<Mode>, &round);
    }
  }
}

// --- experts --------------------------------------------------------------------------------------

/// At most MC rows of one expert.
struct Segment {
  const wl_expert *expert;
  int64_t first, rows;
  float *packed, *packed_up, *hidden;  // the same for gate and up, unless their sums have another order
};

struct ExpertRound {
  const float *x;
  int64_t ldx;
  float *out;
  int64_t ldo;
  int32_t activation;
  float alpha, limit;
  int64_t max_groups;
  std::vector<Segment> segments;
  std::vector<int64_t> block_ends, hidden_ends, out_ends;  // running totals of items
};

inline V silu(V x) { return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)))); }

/// x / 2 * (1 + tanh(z)) is x * sigmoid(2 z), with z = sqrt(2 / pi) * (x + 0.044715 x^3).
inline V gelu(V x) {
  const V cubic = v_fma(v_mul(x, x), v_set(2 * 0.7978845608f * 0.044715f), v_set(2 * 0.7978845608f));
  return v_mul(x, v_sigmoid(v_mul(x, cubic)));
}

inline V activate(const ExpertRound &round, V gate, V up) {
  if (round.activation == WL_SWIGLU) return v_mul(silu(gate), up);
  if (round.activation == WL_GEGLU) return v_mul(gelu(gate), up);
  if (round.activation == WL_RELU_SQUARED) return v_mul(v_max(v_zero(), up), v_max(v_zero(), up));
  // the limit comes first: min and max then pass on NaN in their second operand
  gate = v_min(v_set(round.limit), gate);
  up = v_max(v_set(-round.limit), v_min(v_set(round.limit), up));
  return v_mul(v_mul(v_add(up, v_set(1.0f)), gate), v_sigmoid(v_mul(gate, v_set(round.alpha))));
}

/// The gate; where there is none its sums lie like those of up.
inline const wl_matrix &gate_of(const wl_expert &e) { return e.gate ? *e.gate : *e.up; }

/// Panels of hidden columns that are made together.
template <class Mode>
inline int hidden_panels(const wl_expert &e, int64_t rows) {
  return std::max(Layout<Mode>(gate_of(e), rows).panels(), Layout<Mode>(*e.up, rows).panels());
}

/// One panel of hidden columns from those of gate and up, packed for the down projection.
template <class Mode>
inline void activate_panel(const ExpertRound &round, const Segment &s, int64_t n0, float *gates, const float *ups) {
  const wl_expert &e = *s.expert;
  const int64_t inner = e.up->n, count = std::min<int64_t>(NR, inner - n0);
  float gate_bias[NR] = {}, up_bias[NR] = {};
  for (int64_t j = 0; j < count; j++) {
    if (e.gate_bias) gate_bias[j] = e.gate_bias[n0 + j];
    if (e.up_bias) up_bias[j] = e.up_bias[n0 + j];
  }
  for (int64_t i = 0; i < s.rows; i++)
    for (int v = 0; v < NV; v++) {
      float *gate = gates + i * NR + v * W;
      V u = v_load(ups + i * NR + v * W), g = e.gate ? v_load(gate) : u;
      if (e.gate_bias) g = v_add(g, v_load(gate_bias + v * W));
      if (e.up_bias) u = v_add(u, v_load(up_bias + v * W));
      v_store(gate, activate(round, g, u));
    }
  const Layout<Mode> down(*e.down, s.rows);
  const Blocks blocks{s.rows};
  for (int64_t b = 0; b < blocks.count(); b++) {
    const float *pointers[MR];
    for (int i = 0; i < blocks.size(b); i++) pointers[i] = gates + (blocks.begin(b) + i) * NR;
    down.pack(pointers, blocks, b, {n0, count, inner}, s.hidden);
  }
}

/// An item of hidden columns of a segment.
template <class Mode>
inline void hidden_columns(const ExpertRound &round, const Segment &s, int64_t item, const Bench &bench) {
  const wl_expert &e = *s.expert;
  const int panels = hidden_panels<Mode>(e, s.rows);
  const int64_t n0 = item * panels * NR;
  if (e.gate) multiply_columns<Mode>(*e.gate, n0, panels, s.packed, s.rows, bench.panel, bench.groups, bench.first);
  multiply_columns<Mode>(*e.up, n0, panels, s.packed_up, s.rows, bench.panel, bench.groups, bench.second);
  for (int p = 0; p < panels && n0 + p * NR < e.up->n; p++)
    activate_panel<Mode>(round, s, n0 + p * NR, bench.first + p * s.rows * NR, bench.second + p * s.rows * NR);
}

template <class Mode>
inline void expert_task(wl::Team &team, int thread, void *context) {
  const ExpertRound &round = *static_cast<ExpertRound *>(context);
  int64_t i;
  while ((i = team.next(round.block_ends.back())) >= 0) {
    const auto [index, block] = locate(round.block_ends, i);
    const Segment &s = round.segments[size_t(index)];
    const wl_expert &e = *s.expert;
    pack_block<Mode>(round.x, round.ldx, e.rows, s.first, Blocks{s.rows}, block, gate_of(e), s.packed);
    if (s.packed_up != s.packed) pack_block<Mode>(round.x, round.ldx, e.rows, s.first, Blocks{s.rows}, block, *e.up, s.packed_up);
  }
  auto fetch_hidden = [&](int64_t i) {
    if (i == round.hidden_ends.back()) return;
    const auto [index, item] = locate(round.hidden_ends, i);
    const Segment &s = round.segments[size_t(index)];
    const wl_matrix &gate = gate_of(*s.expert), &up = *s.expert->up;
    const int64_t n0 = item * hidden_panels<Mode>(*s.expert, s.rows) * NR;
    if (s.expert->gate) fetch_start(gate, n0, Layout<Mode>(gate, s.rows));
    fetch_start(up, n0, Layout<Mode>(up, s.rows));
  };
  auto fetch_out = [&](int64_t i) {
    if (i == round.out_ends.back()) return;
    const auto [index, item] = locate(round.out_ends, i);
    const Segment &s = round.segments[size_t(index)];
    const wl_matrix &down = *s.expert->down;
    const Layout<Mode> layout(down, s.rows);
    fetch_start(down, item * layout.panels() * NR, layout);
  };
  fetch_hidden(team.first_beside(thread, round.hidden_ends.back()));
  team.barrier();
  Bench bench(round.max_groups);
  while ((i = team.next_beside(thread, round.hidden_ends.back())) >= 0) {
    const auto [index, item] = locate(round.hidden_ends, i);
    if (i + 1 == round.hidden_ends[size_t(index)]) fetch_hidden(i + 1);
    hidden_columns<Mode>(round, round.segments[size_t(index)], item, bench);
  }
  fetch_out(team.first_beside(thread, round.out_ends.back()));
  team.barrier();
  while ((i = team.next_beside(thread, round.out_ends.back())) >= 0) {
    const auto [index, item] = locate(round.out_ends, i);
    if (i + 1 == round.out_ends[size_t(index)]) fetch_out(i + 1);
    const Segment &s = round.segments[size_t(index)];
    const wl_expert &e = *s.expert;
    const int panels = Layout<Mode>(*e.down, s.rows).panels();
    const int64_t n0 = item * panels * NR;
    multiply_columns<Mode>(*e.down, n0, panels, s.hidden, s.rows, bench.panel, bench.groups, bench.first);
    write_panels(bench.first, panels, s.rows, n0, e.down->n, e.down_bias, round.out, round.ldo, e.places, s.first);
  }
}

template <class Mode>
inline void experts(const float *x, int64_t ldx, float *out, int64_t ldo, const wl_expert *all, int64_t num,
                    int32_t activation, float alpha, float limit) {
  static thread_local wl::Scratch scratch;
  int64_t index = 0, first = 0;
  while (index < num) {
    ExpertRound round{x, ldx, out, ldo, activation, alpha, limit, 0, {}, {}, {}, {}};
    int64_t floats = 0, blocks = 0, hidden = 0, outs = 0;
    std::vector<int64_t> offsets;
    while (index < num && (round.segments.empty() || floats < ROUND_FLOATS)) {
      const wl_expert &e = all[index];
      const int64_t rows = std::min(MC, e.num_rows - first);
      if (rows > 0) {
        const Layout<Mode> gate(gate_of(e), rows), up(*e.up, rows), down(*e.down, rows);
        auto take = [&](int64_t width) {
          offsets.push_back(floats);
          floats += (rows * width + 15) / 16 * 16;
        };
        take(gate.width(e.up->k));
        take(gate == up ? 0 : up.width(e.up->k));
        take(down.width(e.down->k));
        round.segments.push_back({&e, first, rows, nullptr, nullptr, nullptr});
        round.block_ends.push_back(blocks += Blocks{rows}.count());
        round.hidden_ends.push_back(hidden += num_items(e.up->n, hidden_panels<Mode>(e, rows)));
        round.out_ends.push_back(outs += num_items(e.down->n, down.panels()));
        round.max_groups = std::max({round.max_groups, gate.scratch_floats(gate_of(e)), up.scratch_floats(*e.up), down.scratch_floats(*e.down)});
      }
      first += rows;
      if (first >= e.num_rows) {
        index++;
        first = 0;
      }
    }
    if (round.segments.empty()) return;
    float *memory = scratch.floats(floats);
    for (size_t s = 0; s < round.segments.size(); s++) {
      Segment &segment = round.segments[s];
      const wl_expert &e = *segment.expert;
      const bool shared = Layout<Mode>(gate_of(e), segment.rows) == Layout<Mode>(*e.up, segment.rows);
      segment.packed = memory + offsets[3 * s];
      segment.packed_up = shared ? segment.packed : memory + offsets[3 * s + 1];
      segment.hidden = memory + offsets[3 * s + 2];
    }
    wl::run_team(expert_task<Mode>, &round);
  }
}

}  // namespace WL_NS
