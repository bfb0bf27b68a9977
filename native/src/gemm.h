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

/// What the next panel will read: `lines` cache lines of each of its NR rows. Fetched into the
/// second-level cache while a micro tile computes, a row for every KSTEP columns.
struct Ahead {
  const uint8_t *first = nullptr;
  int64_t stride = 0;
  int lines = 0;
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
    const uint8_t *next = ahead.first + k / KSTEP * ahead.stride;
    for (int i = 0; i < ahead.lines; i++) _mm_prefetch(reinterpret_cast<const char *>(next + 64 * i), _MM_HINT_T1);
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

using Micro = void (*)(const float *, const float *, int, float *, bool, const Ahead &);

inline void run_micro(int mr, const float *rows, const float *panel, int count, float *c, bool fresh,
                      const Ahead &ahead) {
  static constexpr Micro table[] = {
      micro<1>, micro<2>, micro<3>, micro<4>, micro<5>, micro<6>,
#if defined(__AVX512F__)
      micro<7>, micro<8>, micro<9>, micro<10>, micro<11>, micro<12>,
#endif
  };
  static_assert(sizeof(table) / sizeof(table[0]) == MR, "one micro tile for each number of rows");
  table[mr - 1](rows, panel, count, c, fresh, ahead);
}

/// c[rows][NR] (+)= all packed blocks of `rows` rows of width `width`, k0 to k0 + count, times panel.
inline void multiply_panel(const float *packed, int64_t rows, int64_t width, int64_t k0, int count,
                           const float *panel, float *c, bool fresh, Ahead ahead = {}) {
  const Blocks blocks{rows};
  for (int64_t b = 0; b < blocks.count(); b++) {
    const int64_t begin = blocks.begin(b);
    const int mr = blocks.size(b);
    run_micro(mr, packed + begin * width + k0 * mr, panel, count, c + begin * NR, fresh, ahead);
    ahead = {};
  }
}

/// The panel after (n0, k0): the next block of k, or the first of the columns at n0 + step.
inline Ahead panel_after(const wl_matrix &m, int64_t n0, int64_t k0, int64_t step) {
  if (!has_contiguous_rows(m)) return {};
  const int64_t bytes = int64_t(KC) * 4 / codes_per_word(m.code);
  const bool same = k0 + KC < m.k;
  if (!same && n0 + step + NR > m.n) return {};
  const int64_t n = same ? n0 : n0 + step, k = same ? (k0 + KC) * 4 / codes_per_word(m.code) : 0;
  return {static_cast<const uint8_t *>(m.codes) + n * m.stride_n + k, m.stride_n, int(bytes / 64)};
}

/// Columns n0 .. n0 + NR of packed rows times a matrix, all of k: c[rows][NR]. `step`: columns to the
/// panel that this thread will probably take next.
inline void multiply_columns(const wl_matrix &m, int64_t n0, const float *packed, int64_t rows, float *panel,
                             float *scratch, float *c, int64_t step) {
  for (int64_t k0 = 0; k0 < m.k; k0 += KC) {
    const int count = int(m.k - k0 < KC ? m.k - k0 : KC);
    unpack_panel(m, n0, k0, count, panel, scratch);
    multiply_panel(packed, rows, m.k, k0, count, panel, c, k0 == 0, panel_after(m, n0, k0, step));
  }
}

}  // namespace WL_NS
