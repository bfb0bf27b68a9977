// Panels times packed rows. Rows are packed in blocks of at most MR as block[k][rows of the block],
// so that a micro tile reads one stream of rows and one of columns.
#pragma once

#include "panel.h"

namespace WL_NS {

/// How T rows are cut into blocks of nearly equal size.
struct Blocks {
  int64_t rows;
  int64_t count() const { return (rows + MR - 1) / MR; }
  int64_t begin(int64_t b) const { return b * rows / count(); }
  int size(int64_t b) const { return int(begin(b + 1) - begin(b)); }
};

/// rows[0..mr) of `count` floats each to dst[count][mr].
inline void pack_rows(const float *const *rows, int mr, int64_t count, float *dst) {
  int64_t k = 0;
  for (; k + W <= count; k += W) {
    VI r[W];
    for (int i = 0; i < W; i++) r[i] = i < mr ? i_load(rows[i] + k) : i_set(0);
    transpose(r);
    static_assert(MR <= W, "one transposition packs a block");
    // whole vectors overlap and later ones overwrite; the last must end with the block
    for (int i = 0; i < W; i++) {
      float *to = dst + (k + i) * mr;
      if ((k + i) * mr + W <= count * mr) {
        v_store(to, as_float(r[i]));
      } else {
        store_some(to, r[i], mr);
      }
    }
  }
  for (; k < count; k++)
    for (int i = 0; i < mr; i++) dst[k * mr + i] = rows[i][k];
}

/// Columns of a row: `count` from `first` on, of `total`.
struct Part {
  int64_t first, count, total;
  int64_t end() const { return first + count; }
};

/// A part of rows, rows[i][0] being column part.first, to dst[place][mr] with each block of k in the
/// order of `chains`; dst is where column 0 goes.
inline void pack_chains(const float *const *rows, int mr, Part part, float *dst, Chains chains) {
  if (!chains.per) return pack_rows(rows, mr, part.count, dst + part.first * mr);
  for (int64_t at = part.first, end; at < part.end(); at = end) {
    const int64_t k0 = at / KC * KC;
    const int length = chains.length(int(std::min<int64_t>(KC, part.total - k0)));
    end = std::min(part.end(), k0 + KC);
    int64_t k = at;
    for (; k + W <= end; k += W) {
      VI r[W];
      for (int i = 0; i < W; i++) r[i] = i < mr ? i_load(rows[i] + k - part.first) : i_set(0);
      transpose(r);
      for (int i = 0; i < W; i++) store_some(dst + (k0 + chains.place(int(k - k0) + i, length)) * mr, r[i], mr);
    }
    for (; k < end; k++)
      for (int i = 0; i < mr; i++) dst[(k0 + chains.place(int(k - k0), length)) * mr + i] = rows[i][k - part.first];
  }
}

/// What will be read next: `lines` cache lines of each of `count` rows, at `offset`. They are fetched
/// into the second-level cache while a micro tile computes, `per_step` rows for every KSTEP columns: the
/// buffers for lines under way are few, and a burst would wait for them.
struct Ahead {
  const uint8_t *const *rows = nullptr;
  int64_t offset = 0;
  int count = 0, per_step = 0, lines = 0;

  /// What block `b` of `blocks` fetches: some of the lines of each row.
  Ahead part(int64_t b, int64_t blocks) const {
    const int first = int(b * lines / blocks);
    return {rows, offset + 64 * first, count, per_step, int((b + 1) * lines / blocks) - first};
  }

  void fetch(int step) const {
    const int first = step * per_step, end = first + per_step < count ? first + per_step : count;
    for (int r = first; r < end; r++)
      for (int i = 0; i < lines; i++) fetch_line(rows[r] + offset + 64 * i);
  }
};
constexpr int KSTEP = KC / NR;

/// fp32 rows times fp32 panels. A mode says what packed rows and panels are made of: 32-bit units,
/// UNIT columns of k in each.
struct Exact {
  static constexpr int UNIT = 1;
  static constexpr bool LANES = true;
  using Column = V;
  static Column column(const float *p) { return v_load(p); }
  static V element(const float *p) { return v_set(*p); }
  static V add(V x, Column w, V sum) { return v_fma(x, w, sum); }
  static Chains chains(const wl_matrix &m) { return Chains::of(m); }
  /// Units that the last block of a packed row takes.
  static int places(int count, Chains chains) { return chains.places(count); }
  static void pack(const float *const *rows, int mr, Part part, float *dst, Chains chains) {
    pack_chains(rows, mr, part, dst, chains);
  }
  /// Words of bf16 stay as they are: a tile widens them beside its products. With 16 registers it has none for that
  /// (64 rows 12 % slower).
  static bool keeps_pairs(const wl_matrix &m) { return W == 16 && has_pairs(m); }
  static void unpack(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch, Chains chains) {
    if (keeps_pairs(m)) unpack_pairs(m, n0, k0, count, panel, {chains.length(count) / 2, 1});
    else unpack_panel(m, n0, k0, count, panel, scratch, chains);
  }
  template <int M>
  static void tile(const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead, Chains chains, bool pairs);

  /// Where x goes as code i of a word of a stripe (lanes.h).
  static void put_lane(float *dst, int64_t base, unsigned word, unsigned i, float x);
};

// gcc does not inline it by itself, and then keeps sums in memory.
template <class Mode, int M>
[[gnu::always_inline]] inline void add_unit(const float *rows, const float *panel, int u, V sum[M][NV]) {
  typename Mode::Column w[NV];
  for (int v = 0; v < NV; v++) w[v] = Mode::column(panel + int64_t(u) * NR + v * W);
  for (int m = 0; m < M; m++) {
    const auto x = Mode::element(rows + int64_t(u) * M + m);
    for (int v = 0; v < NV; v++) sum[m][v] = Mode::add(x, w[v], sum[m][v]);
  }
}

/// Two columns of k that lie in words of bf16, or the first of them.
template <int M, bool BOTH>
[[gnu::always_inline]] inline void add_words(const float *rows, const float *words, V sum[M][NV]) {
  auto add = [&](const float *x, auto widen) __attribute__((always_inline)) {
    V w[NV];
    for (int v = 0; v < NV; v++) w[v] = widen(i_load(words + v * W));
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) sum[m][v] = v_fma(v_set(x[m]), w[v], sum[m][v]);
  };
  add(rows, [](VI r) __attribute__((always_inline)) { return as_float(i_shl<16>(r)); });
  if (BOTH) add(rows + M, [](VI r) __attribute__((always_inline)) { return as_float(i_and(r, i_set(int32_t(0xffff0000)))); });
}

template <int M>
[[gnu::always_inline]] inline void add_to(const float *held, V sum[M][NV]) {
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) sum[m][v] = v_add(v_load(held + m * NR + v * W), sum[m][v]);
}

template <int M>
[[gnu::always_inline]] inline void store_sums(float *to, const V sum[M][NV]) {
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) v_store(to + m * NR + v * W, sum[m][v]);
}

/// c[M][NR] (+)= M packed rows times a panel of `units` units of Mode, in ascending order.
template <class Mode, int M>
inline void tile_in_order(const float *rows, const float *panel, int units, float *c, bool fresh, const Ahead &ahead) {
  V sum[M][NV];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) sum[m][v] = v_zero();
  constexpr int STEP = KSTEP / Mode::UNIT;
  int u = 0;
  for (; u + STEP <= units; u += STEP) {
    ahead.fetch(u / STEP);
#pragma GCC unroll 4
    for (int i = 0; i < STEP; i++) add_unit<Mode, M>(rows, panel, u + i, sum);
  }
  for (; u < units; u++) add_unit<Mode, M>(rows, panel, u, sum);
  if (!fresh) add_to<M>(c, sum);
  store_sums<M>(c, sum);
}

/// The same in chains. They are added up as a tree (add_lanes): sums of 1, 2, 4, ...
/// chains wait for their equals, as in a binary counter.
template <int M, bool PAIRS>
inline void tile_in_chains(const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead,
                           Chains chains) {
  constexpr int LEVELS = std::countr_zero(unsigned(W));
  alignas(64) float waiting[LEVELS][M * NR];
  const int step = chains.length(count);
  for (int j = 0; j < W; j++) {
    const int columns = std::max(0, chains.columns(j, count));
    V sum[M][NV];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) sum[m][v] = v_zero();
    const float *x = rows + j * step * M, *w = panel + j * (PAIRS ? step / 2 : step) * NR;
    int u = 0;
    for (; u + 4 <= columns; u += 4) {
      if (u % 8 == 0 && u < NR / W * 8) ahead.fetch(j * (NR / W) + u / 8);
      if constexpr (PAIRS) {
        add_words<M, true>(x + u * M, w + u / 2 * NR, sum);
        add_words<M, true>(x + (u + 2) * M, w + (u / 2 + 1) * NR, sum);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) add_unit<Exact, M>(x, w, u + i, sum);
      }
    }
    if constexpr (PAIRS) {
      for (; u + 2 <= columns; u += 2) add_words<M, true>(x + u * M, w + u / 2 * NR, sum);
      if (u < columns) add_words<M, false>(x + u * M, w + u / 2 * NR, sum);
    } else {
      for (; u < columns; u++) add_unit<Exact, M>(x, w, u, sum);
    }
    int level = 0;
    for (; j >> level & 1; level++) add_to<M>(waiting[level], sum);
    if (level < LEVELS) {
      store_sums<M>(waiting[level], sum);
    } else {
      if (!fresh) add_to<M>(c, sum);
      store_sums<M>(c, sum);
    }
  }
}

template <int M>
inline void Exact::tile(const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead,
                        Chains chains, bool pairs) {
  if (pairs) tile_in_chains<M, true>(rows, panel, count, c, fresh, ahead, chains);
  else tile_in_chains<M, false>(rows, panel, count, c, fresh, ahead, chains);
}

/// The same with bf16 activations, where no instruction multiplies bf16.
struct Bf16 : Exact {
  static void put_lane(float *dst, int64_t base, unsigned word, unsigned i, float x) {
    float lanes[W];
    v_store(lanes, round_bf16(v_set(x)));
    Exact::put_lane(dst, base, word, i, lanes[0]);
  }
  static void pack(const float *const *rows, int mr, Part part, float *dst, Chains chains) {
    alignas(64) float near[MR][KC];
    const float *pointers[MR];
    for (int64_t k = 0; k < part.count; k += KC) {
      const int64_t here = std::min<int64_t>(KC, part.count - k);
      for (int i = 0; i < mr; i++) {
        std::memcpy(near[i], rows[i] + k, size_t(here) * 4);
        for (int64_t j = 0; j < here; j += W) v_store(near[i] + j, round_bf16(v_load(near[i] + j)));
        pointers[i] = near[i];
      }
      pack_chains(pointers, mr, {part.first + k, here, part.total}, dst, chains);
    }
  }
};

/// 32-bit units of a packed row of k columns.
template <class Mode>
inline int64_t packed_width(int64_t k, Chains chains) {
  const int64_t whole = k / KC * KC;
  return whole / Mode::UNIT + (k > whole ? Mode::places(int(k - whole), chains) : 0);
}

/// How a block of at most MR rows meets a panel.
template <class Mode>
struct ChainTile {
  Chains chains;
  bool pairs;  // the panel has words of bf16
  template <int M>
  static void run(ChainTile t, const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead) {
    Mode::template tile<M>(rows, panel, count, c, fresh, ahead, t.chains, t.pairs);
  }
};

struct OrderedTile {
  template <int M>
  static void run(OrderedTile, const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead) {
    tile_in_order<Exact, M>(rows, panel, count, c, fresh, ahead);
  }
};

template <class Tile>
inline void run_tile(Tile tile, int mr, const float *rows, const float *panel, int count, float *c, bool fresh,
                     const Ahead &ahead) {
  using Run = void (*)(Tile, const float *, const float *, int, float *, bool, const Ahead &);
  static constexpr Run table[] = {
      Tile::template run<1>, Tile::template run<2>, Tile::template run<3>,
      Tile::template run<4>, Tile::template run<5>, Tile::template run<6>,
#if defined(__AVX512F__)
      Tile::template run<7>, Tile::template run<8>, Tile::template run<9>,
      Tile::template run<10>, Tile::template run<11>, Tile::template run<12>,
#endif
#if defined(WL_MR)
      Tile::template run<13>, Tile::template run<14>, Tile::template run<15>, Tile::template run<16>,
#endif
  };
  static_assert(sizeof(table) / sizeof(table[0]) == MR, "one tile for each number of rows");
  table[mr - 1](tile, rows, panel, count, c, fresh, ahead);
}

/// c[rows][NR] (+)= all packed blocks of `rows` rows of `width` units, from unit `first` on, times a
/// panel of `count` columns.
template <class Tile>
inline void multiply_panel(Tile tile, const float *packed, int64_t rows, int64_t width, int64_t first, int count,
                           const float *panel, float *c, bool fresh, const Ahead &ahead) {
  const Blocks blocks{rows};
  for (int64_t b = 0; b < blocks.count(); b++) {
    const int64_t begin = blocks.begin(b);
    const int mr = blocks.size(b);
    run_tile(tile, mr, packed + begin * width + first * mr, panel, count, c + begin * NR, fresh,
             ahead.part(b, blocks.count()));
  }
}

/// The same where rows and panel hold k in ascending order, of attention.
inline void multiply_in_order(const float *packed, int64_t rows, int64_t width, int64_t k0, int count,
                              const float *panel, float *c, bool fresh, const Ahead &ahead) {
  multiply_panel(OrderedTile{}, packed, rows, width, k0, count, panel, c, fresh, ahead);
}

/// The lines of the panel after (n0, k0): the next block of k, or the first of the next columns. `rows`
/// are those of this panel where they are contiguous; `lines` is room for pointers to others.
inline Ahead panel_after(const wl_matrix &m, const uint8_t *const rows[NR], int64_t n0, int64_t k0, const uint8_t *lines[KC]) {
  const bool same = k0 + KC < m.k;
  if (!same && n0 + 2 * NR > m.n) return {};
  const int per = codes_per_word(m.code);
  if (has_contiguous_rows(m)) return {rows, same ? (k0 + KC) * 4 / per : NR * m.stride_n, NR, 1, KC * 4 / per / 64};
  if (m.packing == WL_ROWS) return {};
  // rows of words: of `per` k and one column each, or of one k and eight columns each
  const int64_t k = same ? k0 + KC : 0, n = same ? n0 : n0 + NR, tall = m.packing == WL_AWQ ? 1 : per;
  const int count = int(std::min<int64_t>(KC, m.k - k) / tall);
  const uint8_t *first = static_cast<const uint8_t *>(m.codes) + k / tall * m.stride_k + (tall == 1 ? n / 8 : n) * 4;
  for (int i = 0; i < count; i++) lines[i] = first + i * m.stride_k;
  return {lines, 0, count, (count + NR - 1) / NR, tall == 1 ? 1 : NR * 4 / 64};
}

/// Columns n0 .. n0 + NR of packed blocks times a matrix: see multiply_columns.
template <class Mode>
inline void multiply_panels(const wl_matrix &m, int64_t n0, const float *packed, int64_t rows, float *panel,
                             float *scratch, float *c) {
  const uint8_t *rows_of[NR];
  for (int i = 0; i < NR; i++) rows_of[i] = stored_row(m, n0 + i);
  const uint8_t *lines[KC];
  const ChainTile<Mode> tile{Mode::chains(m), Exact::keeps_pairs(m)};
  const int64_t width = packed_width<Mode>(m.k, tile.chains);
  for (int64_t k0 = 0; k0 < m.k; k0 += KC) {
    const int count = int(m.k - k0 < KC ? m.k - k0 : KC);
    Mode::unpack(m, n0, k0, count, panel, scratch, tile.chains);
    multiply_panel(tile, packed, rows, width, k0 / Mode::UNIT, count, panel, c, k0 == 0,
                   panel_after(m, rows_of, n0, k0, lines));
  }
}

}  // namespace WL_NS
