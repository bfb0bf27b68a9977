// Few rows times a matrix whose rows are contiguous: every stored row is read as it lies, with lanes
// along k, and nothing is transposed but the sums. The same bits as panels give (Chains).
#pragma once

#include "gemm.h"
#include "lane_groups.h"

namespace WL_NS {

constexpr int FEW_ROWS = 4;  // whose sums fit into 16 registers beside weights
/// Rows up to which this is faster than panels: where codes are packed, and registers enough, unpacking costs more than more sums.
constexpr int lane_rows(int code) { return W == 16 && has_scales(code) ? 8 : FEW_ROWS; }
constexpr int64_t LANE_AHEAD = 4096;   // bytes between what is read and what is fetched
constexpr int64_t LANE_FLOATS = (LANE_COLUMNS / KC) * FEW_ROWS * W * W + 2 * W * LANE_GROUPS;

inline void Exact::put_lane(float *dst, int64_t base, unsigned word, unsigned i, float x) {
  dst[base + i * W + word] = x;
}

/// Code i of each word of a stripe as its column.
inline VI places_of_words(int per, int i) {
  int32_t places[W];
  for (int j = 0; j < W; j++) places[j] = j * per + i;
  return i_load(places);
}

/// CB stored rows times M packed ones.
template <int CODE, bool ZERO, int M, int CB>
struct LaneRows {
  static constexpr int PER = codes_per_word(CODE), STRIPE = W * PER, STRIPES = KC / STRIPE;
  const uint8_t *rows[CB];
  const float *x;
  int64_t ldx, ahead;  // ahead: bytes from what is read to what is fetched
  const LaneGroups &groups;
  int first;  // the first row's place in `groups`

  [[gnu::always_inline]] void look_up(int64_t k, V scale[CB], V zero[CB]) const {
    if constexpr (has_scales(CODE)) {
      const int64_t group = first * LANE_GROUPS + groups.at(k);
      for (int c = 0; c < CB; c++) {
        scale[c] = permute(v_load(groups.scale + c * LANE_GROUPS + group), groups.pattern);
        zero[c] = ZERO ? permute(v_load(groups.zero + c * LANE_GROUPS + group), groups.pattern) : v_set(load_plain_zero(CODE));
      }
    }
  }

  /// The stripe from column k on.
  [[gnu::always_inline]] void add_stripe(int64_t k, V sum[CB][M]) const {
    Words<CODE, ZERO> r[CB];
    V scale[CB], zero[CB];
    for (int c = 0; c < CB; c++) {
      r[c] = Words<CODE, ZERO>(i_load(rows[c] + k * 4 / PER));
      fetch_line<_MM_HINT_T0>(rows[c] + k * 4 / PER + ahead);
    }
    look_up(k, scale, zero);
    each<PER>([&](auto i) __attribute__((always_inline)) {
      V w[CB];
      for (int c = 0; c < CB; c++) w[c] = weight_of<CODE, ZERO, i()>(r[c], scale[c], zero[c]);
      for (int j = 0; j < M; j++) {
        const V y = v_load(x + j * ldx + k + i() * W);
        for (int c = 0; c < CB; c++) sum[c][j] = v_fma(y, w[c], sum[c][j]);
      }
    });
  }

  /// The last stripe, which has `rest` columns: only bytes that exist are read, only sums that exist are changed.
  void add_rest(int64_t k, int rest, V sum[CB][M]) const {
    V scale[CB], zero[CB];
    look_up(k, scale, zero);
    const VI left = i_set(rest);
    for (int c = 0; c < CB; c++) {
      const Words<CODE, ZERO> r(load_some<W * 4>(rows[c] + k * 4 / PER, (rest * 4 + PER - 1) / PER));
      each<PER>([&](auto i) __attribute__((always_inline)) {
        const V w = weight_of<CODE, ZERO, i()>(r, scale[c], zero[c]);
        for (int j = 0; j < M; j++) {
          const V y = v_load(x + j * ldx + k + i() * W);
          sum[c][j] = where_less(places_of_words(PER, i()), left, v_fma(y, w, sum[c][j]), sum[c][j]);
        }
      });
    }
  }

  /// to[block][M][row][chain] = chains of the columns k0 .. end, block by block.
  [[gnu::always_inline]] void multiply(int64_t k0, int64_t end, float *to) const {
    auto block = [&](auto add) __attribute__((always_inline)) {
      V sum[CB][M];
      for (int c = 0; c < CB; c++)
        for (int j = 0; j < M; j++) sum[c][j] = v_zero();
      add(sum);
      for (int c = 0; c < CB; c++)
        for (int j = 0; j < M; j++) v_store(to + (j * W + c) * W, sum[c][j]);
      to += M * W * W;
    };
    for (; k0 + KC <= end; k0 += KC)
      block([&](auto &sum) __attribute__((always_inline)) {
        if constexpr (STRIPES <= 4) each<STRIPES>([&](auto s) __attribute__((always_inline)) { add_stripe(k0 + s() * STRIPE, sum); });
        else for (int s = 0; s < STRIPES; s++) add_stripe(k0 + s * STRIPE, sum);
      });
    if (k0 == end) return;
    block([&](auto &sum) {
      for (; k0 + STRIPE <= end; k0 += STRIPE) add_stripe(k0, sum);
      if (k0 < end) add_rest(k0, int(end - k0), sum);
    });
  }
};

/// c[row * NR] (+)= the chains of W columns in all blocks: `lanes` [block][M][column][chain].
inline void add_chains(const float *lanes, int M, int64_t blocks, float *c, bool fresh) {
  for (int m = 0; m < M; m++) {
    V sum = fresh ? v_zero() : v_load(c + m * NR);
    for (int64_t b = 0; b < blocks; b++) {
      V r[W];
      for (int i = 0; i < W; i++) r[i] = v_load(lanes + ((b * M + m) * W + i) * W);
      sum = fresh && b == 0 ? add_lanes(r) : v_add(sum, add_lanes(r));
    }
    v_store(c + m * NR, sum);
  }
}

template <int CODE, bool ZERO, int M>
inline void multiply_lanes_of(const wl_matrix &m, int64_t n0, const float *x, int64_t ldx, float *scratch, float *c) {
  constexpr int64_t AT_ONCE = M <= FEW_ROWS ? LANE_COLUMNS : LANE_COLUMNS / 2;
  // Where codes are cheap to widen, memory decides, which is read fastest in one direction (measured: 47
  // GB/s of 47 row by row, 40 in four rows at once); else rows at once hide the latency of sums.
  constexpr int CB = M > FEW_ROWS ? 2 : !has_scales(CODE) ? 1 : W == 16 ? 4 : M == 1 ? 4 : 2;
  static_assert(W % CB == 0);
  const int64_t ahead = m.stride_n * CB * std::max<int64_t>(LANE_AHEAD / (m.stride_n * CB), 1);
  float *lanes = scratch;
  LaneGroups groups(m, scratch + (LANE_COLUMNS / KC) * FEW_ROWS * W * W);
  for (int v = 0; v < NV; v++) {
    const int64_t first = n0 + v * W;
    if (first >= m.n) continue;
    for (int64_t k1 = 0; k1 < m.k; k1 += AT_ONCE) {
      const int64_t end = std::min(m.k, k1 + AT_ONCE);
      if (has_scales(CODE)) groups.fill(first, k1, end);
      for (int i = 0; i < W; i += CB) {
        LaneRows<CODE, ZERO, M, CB> some{{}, x, ldx, ahead, groups, i};
        for (int j = 0; j < CB; j++) some.rows[j] = stored_row(m, first + i + j);
        if (has_scales(CODE) && k1 == 0) Groups::fetch(m, first + W + i, CB);
        some.multiply(k1, end, lanes + i * W);
      }
      add_chains(lanes, M, (end - k1 + KC - 1) / KC, c + v * W, k1 == 0);
    }
  }
}

/// f<M>() for M = `rows`, at most MOST.
template <int MOST, class F>
inline void with_rows(int64_t rows, F f) {
  each<MOST>([&](auto i) {
    if (rows == i() + 1) f.template operator()<i() + 1>();
  });
}

/// Columns n0 .. n0 + NR of `rows` packed rows (at most lane_rows) times a matrix: c[rows][NR].
inline void multiply_lanes(const wl_matrix &m, int64_t n0, const float *x, int64_t ldx, int64_t rows, float *scratch,
                           float *c) {
  with_code(m, [&]<int CODE, bool ZERO>() {
    with_rows<lane_rows(CODE)>(rows, [&]<int M>() { multiply_lanes_of<CODE, ZERO, M>(m, n0, x, ldx, scratch, c); });
  });
}

/// A part of a row, row[0] being column part.first, as lanes meet it; dst is where column 0 goes.
template <class Mode, int PER>
inline void pack_lanes_of(const float *row, Part part, float *dst) {
  constexpr int64_t STRIPE = W * PER;
  for (int64_t at = part.first, end; at < part.end(); at = end) {
    const int64_t base = at / STRIPE * STRIPE;
    end = std::min(part.end(), base + STRIPE);
    for (int64_t k = at; k < end; k++)
      Mode::put_lane(dst, base, unsigned(k - base) / PER, unsigned(k - base) % PER, row[k - part.first]);
    // behind the last column
    for (int64_t k = end; end == part.total && k < base + STRIPE; k++)
      Mode::put_lane(dst, base, unsigned(k - base) / PER, unsigned(k - base) % PER, 0.0f);
  }
}

template <class Mode>
inline void pack_lanes(const float *row, Part part, float *dst, Chains chains) {
  switch (chains.per) {
    case 0:
    case 1: return pack_lanes_of<Mode, 1>(row, part, dst);
    case 2: return pack_lanes_of<Mode, 2>(row, part, dst);
    case 4: return pack_lanes_of<Mode, 4>(row, part, dst);
    case 8: return pack_lanes_of<Mode, 8>(row, part, dst);
  }
}

}  // namespace WL_NS
