// Few rows times a matrix whose rows are contiguous: every stored row is read as it lies, with lanes
// along k, and nothing is transposed but the sums. The same bits as panels give (Chains).
#pragma once

#include <utility>

#include "gemm.h"

namespace WL_NS {

constexpr int LANE_ROWS = 4;           // up to here this is faster than panels
constexpr int LANE_COLUMNS = 2048;     // of k whose sums wait to be added up
constexpr int64_t LANE_AHEAD = 4096;   // bytes between what is read and what is fetched
constexpr int LANE_GROUPS = LANE_COLUMNS / 8 + 2 + W;  // scales of a stored row: a group has a word or more
constexpr int64_t LANE_FLOATS = (LANE_COLUMNS / KC) * LANE_ROWS * W * W + 2 * W * LANE_GROUPS;

/// f(0), f(1), ... as constants, below N.
template <int N, class F>
[[gnu::always_inline]] inline void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

constexpr bool has_scales(int code) { return codes_per_word(code) > 2; }

/// Code I of each word as a weight.
template <int CODE, bool ZERO, int I>
[[gnu::always_inline]] inline V lane_weight(VI r, V scale, V zero) {
  constexpr int BITS = 32 / codes_per_word(CODE);
  if constexpr (CODE == WL_F32) {
    return as_float(r);
  } else if constexpr (CODE == WL_BF16) {
    return as_float(I ? i_and(r, i_set(int32_t(0xffff0000))) : i_shl<16>(r));
  } else if constexpr (CODE == WL_F16) {
    return half_to_float(i_shr<I * 16>(r));
  } else if constexpr (CODE == WL_E2M1) {
    return v_mul(lookup16(i_shr<I * BITS>(r), FP4), scale);
  } else if constexpr (CODE == WL_E4M3) {
    return v_mul(e4m3_of_word(r, I), scale);
  } else if constexpr (CODE == WL_INT4 && !ZERO) {
    return v_mul(lookup16(i_shr<I * BITS>(r), INT4), scale);
  } else {
    // Where it lies in half a word, a code is the end of the mantissa of a power of two, which goes with the zero.
    constexpr int PLACE = I * BITS % 16, POWER = 23 - PLACE;
    const VI bits = i_and_or(I * BITS < 16 ? r : i_shr<16>(r), i_set(((1 << BITS) - 1) << PLACE), i_set((127 + POWER) << 23));
    return v_mul(v_sub(as_float(bits), v_add(zero, v_set(1 << POWER))), scale);
  }
}

inline void Exact::put_lane(float *dst, int64_t base, unsigned word, unsigned i, float x) {
  dst[base + i * W + word] = x;
}

/// Code i of each word of a stripe as its column.
inline VI places_of_words(int per, int i) {
  int32_t places[W];
  for (int j = 0; j < W; j++) places[j] = j * per + i;
  return i_load(places);
}

/// Scales and zeros of some stored rows, and which of them belong to the words of a stripe.
struct LaneGroups {
  float *scale, *zero;  // [stored row][LANE_GROUPS], from group `first_group` on
  int64_t first_group = 0;
  bool regular = true;
  int shift = 0;  // to divide by block_k, or -1
  VI pattern = i_set(0);  // of each word of a stripe: its group, counted from the stripe's first

  static VI pattern_at(const wl_matrix &m, int64_t k, int per) {
    int32_t groups[W];
    for (int j = 0; j < W; j++) groups[j] = int32_t((k + j * per) / m.block_k - k / m.block_k);
    return i_load(groups);
  }
  LaneGroups(const wl_matrix &m, float *memory, int per) : scale(memory), zero(memory + W * LANE_GROUPS) {
    if (!has_scales(m.code)) return;
    regular = m.block_k % (W * per) == 0 || W * per % m.block_k == 0;
    shift = std::has_single_bit(uint64_t(m.block_k)) ? std::countr_zero(uint64_t(m.block_k)) : -1;
    pattern = pattern_at(m, 0, per);
  }

  /// The group of column k, counted from the first that is filled in. Divisions take as long as a stripe.
  int64_t at(const wl_matrix &m, int64_t k) const { return (shift >= 0 ? k >> shift : k / m.block_k) - first_group; }

  /// For W stored rows at once: what was just written in parts cannot be read as a vector for a while.
  void fill(const wl_matrix &m, int64_t n0, int64_t k0, int64_t k1) {
    first_group = k0 / m.block_k;
    const int64_t last = (k1 - 1) / m.block_k;
    for (int c = 0; c < W; c++) {
      const int64_t column = std::min(n0 + c, m.n - 1), n = m.block_n == 1 ? column : column / m.block_n;
      row_of_scales(m, n, first_group, last - first_group + 1, scale + c * LANE_GROUPS);
      if (m.zero_type == WL_Z_NONE) continue;
      for (int64_t g = first_group; g <= last; g++) zero[c * LANE_GROUPS + g - first_group] = load_zero(m, n, g);
    }
  }
};

/// out[column][W] = chains of `count` columns of k from k0 on (one block), of CB stored rows and M packed
/// rows: out + m * stride. Inlined for its constants: four-bit codes of a block are two stripes.
template <int CODE, bool ZERO, int M, int CB>
[[gnu::always_inline]] inline void lane_block(const wl_matrix &m, const uint8_t *const *rows, int first_row, int64_t k0,
                                              int count, const float *x, int64_t ldx, const LaneGroups &groups, float *out,
                                              int64_t stride, int64_t ahead) {
  constexpr int PER = codes_per_word(CODE), STRIPE = W * PER;
  V sum[CB][M];
  for (int c = 0; c < CB; c++)
    for (int i = 0; i < M; i++) sum[c][i] = v_zero();
  const V plain = v_set(load_plain_zero(m.code));
  V scale[CB], zero[CB];
  auto look_up = [&](int64_t k) __attribute__((always_inline)) {
    if constexpr (has_scales(CODE)) {
      const VI pattern = groups.regular ? groups.pattern : LaneGroups::pattern_at(m, k, PER);
      const int64_t first = groups.at(m, k);
      for (int c = 0; c < CB; c++) {
        scale[c] = permute(v_load(groups.scale + (first_row + c) * LANE_GROUPS + first), pattern);
        zero[c] = ZERO ? permute(v_load(groups.zero + (first_row + c) * LANE_GROUPS + first), pattern) : plain;
      }
    }
  };
  int k = 0;
  x += k0;
  for (; k + STRIPE <= count; k += STRIPE, x += STRIPE) {
    VI r[CB];
    for (int c = 0; c < CB; c++) {
      r[c] = i_load(rows[c] + (k0 + k) * 4 / PER);
      fetch_line<_MM_HINT_T0>(rows[c] + (k0 + k) * 4 / PER + ahead);
    }
    look_up(k0 + k);
    each<PER>([&](auto i) __attribute__((always_inline)) {
      V w[CB];
      for (int c = 0; c < CB; c++) w[c] = lane_weight<CODE, ZERO, i()>(r[c], scale[c], zero[c]);
      for (int j = 0; j < M; j++) {
        const V y = v_load(x + j * ldx + i() * W);
        for (int c = 0; c < CB; c++) sum[c][j] = v_fma(y, w[c], sum[c][j]);
      }
    });
  }
  if (const int rest = count - k; rest > 0) {  // only bytes that exist are read, only sums that exist are changed
    look_up(k0 + k);
    const VI left = i_set(rest);
    for (int c = 0; c < CB; c++) {
      alignas(64) uint8_t bytes[W * 4] = {};
      std::memcpy(bytes, rows[c] + (k0 + k) * 4 / PER, size_t((rest * 4 + PER - 1) / PER));
      const VI r = i_load(bytes);
      each<PER>([&](auto i) __attribute__((always_inline)) {
        const V w = lane_weight<CODE, ZERO, i()>(r, scale[c], zero[c]);
        for (int j = 0; j < M; j++) {
          const V y = v_load(x + j * ldx + i() * W);
          sum[c][j] = where_less(places_of_words(PER, i()), left, v_fma(y, w, sum[c][j]), sum[c][j]);
        }
      });
    }
  }
  for (int c = 0; c < CB; c++)
    for (int j = 0; j < M; j++) v_store(out + j * stride + c * W, sum[c][j]);
}

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
  constexpr int64_t AT_ONCE = M <= 2 ? LANE_COLUMNS : M <= 4 ? LANE_COLUMNS / 2 : LANE_COLUMNS / 4;
  // Where codes are cheap to widen, memory decides, which is read fastest in one direction (measured: 47
  // GB/s of 47 row by row, 40 in four rows at once); else rows at once hide the latency of sums.
  constexpr int CB = !has_scales(CODE) ? 1 : W == 16 ? 4 : M == 1 ? 4 : 2;
  static_assert(W % CB == 0);
  const Chains chains{codes_per_word(CODE)};
  const int64_t ahead = m.stride_n * CB * std::max<int64_t>(LANE_AHEAD / (m.stride_n * CB), 1);
  float *lanes = scratch;
  LaneGroups groups(m, scratch + (LANE_COLUMNS / KC) * LANE_ROWS * W * W, chains.per);
  for (int v = 0; v < NV; v++) {
    const int64_t first = n0 + v * W;
    if (first >= m.n) continue;
    for (int64_t k1 = 0; k1 < m.k; k1 += AT_ONCE) {
      const int64_t end = std::min(m.k, k1 + AT_ONCE);
      if (has_scales(CODE)) groups.fill(m, first, k1, end);
      for (int i = 0; i < W; i += CB) {
        const uint8_t *rows[CB];
        for (int j = 0; j < CB; j++)
          rows[j] = static_cast<const uint8_t *>(m.codes) + std::min(first + i + j, m.n - 1) * m.stride_n;
        for (int64_t k0 = k1; k0 < end; k0 += KC)
          lane_block<CODE, ZERO, M, CB>(m, rows, i, k0, int(std::min<int64_t>(KC, end - k0)), x, ldx, groups,
                                              lanes + ((k0 - k1) / KC * M * W + i) * W, W * W, ahead);
      }
      add_chains(lanes, M, (end - k1 + KC - 1) / KC, c + v * W, k1 == 0);
    }
  }
}

/// f<M>() for M = `rows`, at most LANE_ROWS.
template <class F>
inline void with_rows(int64_t rows, F f) {
  switch (rows) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
  }
}

/// f<CODE, ZERO>() for the codes of a matrix; ZERO: it has zero points of its own.
template <class F>
inline void with_code(const wl_matrix &m, F f) {
  const bool zero = m.zero_type != WL_Z_NONE;
  switch (m.code) {
    case WL_F32: return f.template operator()<WL_F32, false>();
    case WL_BF16: return f.template operator()<WL_BF16, false>();
    case WL_F16: return f.template operator()<WL_F16, false>();
    case WL_E4M3: return f.template operator()<WL_E4M3, false>();
    case WL_E2M1: return f.template operator()<WL_E2M1, false>();
    case WL_INT8: return zero ? f.template operator()<WL_INT8, true>() : f.template operator()<WL_INT8, false>();
    case WL_INT4: return zero ? f.template operator()<WL_INT4, true>() : f.template operator()<WL_INT4, false>();
  }
}

/// Columns n0 .. n0 + NR of `rows` packed rows (at most LANE_ROWS) times a matrix: c[rows][NR].
inline void multiply_lanes(const wl_matrix &m, int64_t n0, const float *x, int64_t ldx, int64_t rows, float *scratch,
                           float *c) {
  with_code(m, [&]<int CODE, bool ZERO>() {
    with_rows(rows, [&]<int M>() { multiply_lanes_of<CODE, ZERO, M>(m, n0, x, ldx, scratch, c); });
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
