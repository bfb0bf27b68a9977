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
        float lanes[W];
        v_store(lanes, as_float(r[i]));
        for (int j = 0; j < mr; j++) to[j] = lanes[j];
      }
    }
  }
  for (; k < count; k++)
    for (int i = 0; i < mr; i++) dst[k * mr + i] = rows[i][k];
}

/// Starts to bring a line into the second-level cache. gcc 12 removes loops that do nothing else unless
/// something volatile is in them (attention at 7 instead of 17 GB/s).
inline void fetch_line(const uint8_t *p) {
  asm volatile("" ::"r"(p));
  _mm_prefetch(reinterpret_cast<const char *>(p), _MM_HINT_T1);
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

template <int M>
inline void micro(const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead) {
  V sum[M][NV];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) sum[m][v] = v_zero();
  auto step = [&](int k) {
    V w[NV];
    for (int v = 0; v < NV; v++) w[v] = v_load(panel + int64_t(k) * NR + v * W);
    for (int m = 0; m < M; m++) {
      V x = v_set(rows[int64_t(k) * M + m]);
      for (int v = 0; v < NV; v++) sum[m][v] = v_fma(x, w[v], sum[m][v]);
    }
  };
  int k = 0;
  for (; k + KSTEP <= count; k += KSTEP) {
    ahead.fetch(k / KSTEP);
#pragma GCC unroll 4
    for (int i = 0; i < KSTEP; i++) step(k + i);
  }
  for (; k < count; k++) step(k);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) {
      float *p = c + m * NR + v * W;
      v_store(p, fresh ? sum[m][v] : v_add(v_load(p), sum[m][v]));
    }
}

/// fp32 rows times fp32 panels. A mode says what packed rows and panels are made of: 32-bit units,
/// UNIT columns of k in each, a multiple of ROUND of them in a row.
struct Exact {
  static constexpr int UNIT = 1, ROUND = 1;
  static void pack(const float *const *rows, int mr, int64_t count, float *dst) { pack_rows(rows, mr, count, dst); }
  static void unpack(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch) {
    unpack_panel(m, n0, k0, count, panel, scratch);
  }
  template <int M>
  static void tile(const float *rows, const float *panel, int units, float *c, bool fresh, const Ahead &ahead) {
    micro<M>(rows, panel, units, c, fresh, ahead);
  }
};

/// The same with rows rounded to bf16, where no instruction multiplies bf16.
struct Rounded : Exact {
  static void pack(const float *const *rows, int mr, int64_t count, float *dst) {
    pack_rows(rows, mr, count, dst);
    int64_t i = 0;
    for (; i + W <= mr * count; i += W) v_store(dst + i, round_bf16(v_load(dst + i)));
    if (i < mr * count) {
      float lanes[W] = {};
      std::memcpy(lanes, dst + i, size_t(mr * count - i) * 4);
      v_store(lanes, round_bf16(v_load(lanes)));
      std::memcpy(dst + i, lanes, size_t(mr * count - i) * 4);
    }
  }
};

/// 32-bit units of a packed row of k columns.
template <class Mode>
inline int64_t packed_width(int64_t k) {
  return (k + Mode::UNIT * Mode::ROUND - 1) / (Mode::UNIT * Mode::ROUND) * Mode::ROUND;
}

template <class Mode>
inline void run_tile(int mr, const float *rows, const float *panel, int units, float *c, bool fresh,
                     const Ahead &ahead) {
  using Tile = void (*)(const float *, const float *, int, float *, bool, const Ahead &);
  static constexpr Tile table[] = {
      Mode::template tile<1>, Mode::template tile<2>, Mode::template tile<3>,
      Mode::template tile<4>, Mode::template tile<5>, Mode::template tile<6>,
#if defined(__AVX512F__)
      Mode::template tile<7>, Mode::template tile<8>, Mode::template tile<9>,
      Mode::template tile<10>, Mode::template tile<11>, Mode::template tile<12>,
#endif
#if defined(WL_MR)
      Mode::template tile<13>, Mode::template tile<14>, Mode::template tile<15>, Mode::template tile<16>,
#endif
  };
  static_assert(sizeof(table) / sizeof(table[0]) == MR, "one tile for each number of rows");
  table[mr - 1](rows, panel, units, c, fresh, ahead);
}

/// c[rows][NR] (+)= all packed blocks of `rows` rows of `width` units, k0 to k0 + count, times panel.
template <class Mode>
inline void multiply_panel(const float *packed, int64_t rows, int64_t width, int64_t k0, int count,
                           const float *panel, float *c, bool fresh, const Ahead &ahead = {}) {
  const Blocks blocks{rows};
  const int units = int(packed_width<Mode>(count));
  for (int64_t b = 0; b < blocks.count(); b++) {
    const int64_t begin = blocks.begin(b);
    const int mr = blocks.size(b);
    run_tile<Mode>(mr, packed + begin * width + k0 / Mode::UNIT * mr, panel, units, c + begin * NR, fresh,
                   ahead.part(b, blocks.count()));
  }
}

/// The panel after (n0, k0), whose rows are given: the next block of k, or the first of the columns at
/// n0 + step.
inline Ahead panel_after(const wl_matrix &m, const uint8_t *const rows[NR], int64_t n0, int64_t k0, int64_t step) {
  if (!has_contiguous_rows(m)) return {};
  const int per = codes_per_word(m.code);
  const bool same = k0 + KC < m.k;
  if (!same && n0 + step + NR > m.n) return {};
  return {rows, same ? (k0 + KC) * 4 / per : step * m.stride_n, NR, 1, KC * 4 / per / 64};
}

/// Columns n0 .. n0 + NR of packed rows times a matrix, all of k: c[rows][NR]. `step`: columns to the
/// panel that this thread will probably take next.
template <class Mode>
inline void multiply_columns(const wl_matrix &m, int64_t n0, const float *packed, int64_t rows, float *panel,
                             float *scratch, float *c, int64_t step) {
  const uint8_t *rows_of[NR];
  for (int i = 0; i < NR; i++)
    rows_of[i] = static_cast<const uint8_t *>(m.codes) + (n0 + i < m.n ? n0 + i : m.n - 1) * m.stride_n;
  for (int64_t k0 = 0; k0 < m.k; k0 += KC) {
    const int count = int(m.k - k0 < KC ? m.k - k0 : KC);
    Mode::unpack(m, n0, k0, count, panel, scratch);
    multiply_panel<Mode>(packed, rows, packed_width<Mode>(m.k), k0, count, panel, c, k0 == 0,
                         panel_after(m, rows_of, n0, k0, step));
  }
}

}  // namespace WL_NS
