// Few rows of bf16 activations times a matrix whose rows are contiguous: stored rows are read W at a time, as they lie, made
// pairs and transposed in registers; no panel is written. The same bits as panels give.
#pragma once

#include "pairs.h"

namespace WL_NS {

constexpr int64_t PAIR_AHEAD = 512;  // bytes between what is read of a stored row and what is fetched

/// A stripe of W stored rows from column k on, `rest` columns being left of their block, as pairs: to[pair][row].
template <int CODE, bool ZERO>
inline void pairs_of_stripe(const wl_matrix &m, const uint8_t *const rows[W], int64_t k, int rest, const LaneGroups &groups,
                            int64_t ahead, VI *to) {
  constexpr int PER = codes_per_word(CODE), STRIPE = W * PER, SETS = PER / 2;
  const V plain = v_set(load_plain_zero(m.code));
  const VI left = i_set(rest);
  const bool is_whole = rest >= STRIPE;
  VI pattern = i_set(0);
  int64_t first = 0;
  if constexpr (has_scales(CODE)) {
    pattern = groups.pattern;
    first = groups.at(k);
  }
  VI pairs[SETS][W];
  each<W>([&](auto c) __attribute__((always_inline)) {
    const uint8_t *from = rows[c()] + k * 4 / PER;
    VI r;
    if (is_whole) {
      r = i_load(from);
      fetch_line<_MM_HINT_T0>(from + ahead);
    } else {  // only bytes that exist are read
      alignas(64) uint8_t bytes[W * 4] = {};
      std::memcpy(bytes, from, size_t((rest * 4 + PER - 1) / PER));
      r = i_load(bytes);
    }
    if constexpr (CODE == WL_BF16) {
      pairs[0][c()] = r;
    } else {
      V scale = v_zero(), zero = plain;
      if constexpr (has_scales(CODE)) {
        scale = permute(v_load(groups.scale + c() * LANE_GROUPS + first), pattern);
        if (ZERO) zero = permute(v_load(groups.zero + c() * LANE_GROUPS + first), pattern);
      }
      const Words<CODE, ZERO> words(r);
      each<SETS>([&](auto i) __attribute__((always_inline)) {
        const V low = weight_of<CODE, ZERO, 2 * i()>(words, scale, zero);
        V high = weight_of<CODE, ZERO, 2 * i() + 1>(words, scale, zero);
        if (!is_whole) high = where_less(places_of_words(PER, 2 * i() + 1), left, high, v_zero());
        pairs[i()][c()] = to_pairs(low, high);
      });
    }
  });
  each<SETS>([&](auto i) __attribute__((always_inline)) {
    transpose(pairs[i()]);
    each<W>([&](auto j) __attribute__((always_inline)) { to[j() * SETS + i()] = pairs[i()][j()]; });
  });
}

/// Adds `count` columns of k from k0 on (one block) of W stored rows to sum[M]; x: packed rows from there on.
template <int CODE, bool ZERO, int M>
inline void add_pairs(const wl_matrix &m, const uint8_t *const rows[W], int64_t k0, int count, const float *x,
                      const LaneGroups &groups, V sum[M]) {
  constexpr int PER = codes_per_word(CODE), STRIPE = W * PER;
  const int64_t row_bytes = m.k * 4 / PER;
  VI pairs[STRIPE / 2];
  for (int k = 0; k < count; k += STRIPE) {
    // behind the end of a row comes the beginning of the one that is read after it
    const bool is_within = (k0 + k) * 4 / PER + PAIR_AHEAD < row_bytes;
    pairs_of_stripe<CODE, ZERO>(m, rows, k0 + k, count - k, groups, PAIR_AHEAD + (is_within ? 0 : W * m.stride_n - row_bytes), pairs);
    const int units = std::min(STRIPE / 2, (count - k + 1) / 2);
    const float *y = x + int64_t(k / 2) * M;
    for (int u = 0; u < units; u++)
      for (int j = 0; j < M; j++) sum[j] = Pairs::add(Pairs::element(y + u * M + j), (__m512bh)pairs[u], sum[j]);
  }
}

/// Columns n0 .. n0 + NR of M packed rows times a matrix: c[M][NR].
template <int CODE, bool ZERO, int M>
inline void multiply_pairs_of(const wl_matrix &m, int64_t n0, const float *packed, float *scratch, float *c) {
  LaneGroups groups(m, scratch);
  for (int v = 0; v < NV; v++) {
    const int64_t n = n0 + v * W;
    if (n >= m.n) return;
    const uint8_t *rows[W];
    for (int i = 0; i < W; i++) rows[i] = stored_row(m, n + i);
    for (int64_t k0 = 0; k0 < m.k; k0 += KC) {
      const int count = int(std::min<int64_t>(KC, m.k - k0));
      if (has_scales(CODE) && k0 % LANE_COLUMNS == 0) {
        groups.fill(n, k0, std::min(m.k, k0 + LANE_COLUMNS));
        if (k0 == 0) Groups::fetch(m, n + W, W);
      }
      V sum[M];
      for (V &one : sum) one = v_zero();
      add_pairs<CODE, ZERO, M>(m, rows, k0, count, packed + k0 / 2 * M, groups, sum);
      for (int j = 0; j < M; j++) {
        float *to = c + j * NR + v * W;
        v_store(to, k0 ? v_add(v_load(to), sum[j]) : sum[j]);
      }
    }
  }
}

inline void multiply_pairs(const wl_matrix &m, int64_t n0, const float *packed, int64_t rows, float *scratch, float *c) {
  with_code(m, [&]<int CODE, bool ZERO>() {
    if constexpr (codes_per_word(CODE) > 1)
      with_rows<FEW_ROWS>(rows, [&]<int M>() { multiply_pairs_of<CODE, ZERO, M>(m, n0, packed, scratch, c); });
  });
}

/// Pairs that are not written to panels where rows are few.
struct FewPairs : Pairs {
  static bool multiply_few(const wl_matrix &m, int64_t n0, const float *packed, int64_t rows, float *scratch, float *c) {
    if (rows > FEW_ROWS || !has_contiguous_rows(m) || codes_per_word(m.code) == 1 || !has_even_groups(m)) return false;
    multiply_pairs(m, n0, packed, rows, scratch, c);
    return true;
  }
};

}  // namespace WL_NS
