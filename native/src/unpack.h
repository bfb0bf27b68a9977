// Stored weights to fp32 panels. A panel holds NR columns n of up to KC consecutive k as
// panel[k][NR]; columns beyond the matrix repeat its last one. Matrices whose rows are contiguous
// are transposed in registers: 32 bits of W rows at a time, one to eight codes each.
#pragma once

#include <algorithm>

#include "codes.h"

namespace WL_NS {

constexpr int KC = 256;  // inner block: sums over it are added to the result in this order
constexpr int AWQ_ORDER[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // nibble of column n % 8

inline float scalar_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float scalar_e8m0(uint8_t x) {
  const uint32_t bits = x == 255 ? 0x7fc00000u : x ? uint32_t(x) << 23 : 0x00400000u;  // 2^-127 is denormal
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

/// `count` scales that lie `stride` elements apart.
inline void load_scales_apart(const wl_matrix &m, int64_t at, int64_t stride, int64_t count, float *to) {
  auto each = [&](auto *scales, auto widen) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i++) to[i] = widen(scales[at + i * stride]);
  };
  switch (m.scale_type) {
    case WL_S_F32: return each(static_cast<const float *>(m.scales), [](float x) { return x; });
    case WL_S_BF16: return each(static_cast<const uint16_t *>(m.scales), scalar_bf16);
    case WL_S_F16: return each(static_cast<const uint16_t *>(m.scales), [](uint16_t x) { return _cvtsh_ss(x); });
    case WL_S_E8M0: return each(static_cast<const uint8_t *>(m.scales), scalar_e8m0);
    default: std::fill(to, to + count, 1.0f);
  }
}

inline float load_zero(const wl_matrix &m, int64_t n, int64_t group) {
  // no division by what gcc does not know: it takes longer than a line of codes
  const bool wide = m.code == WL_INT8;
  const int bits = wide ? 8 : 4, place = bits * int(n & (wide ? 3 : 7));
  const int64_t word = n >> (wide ? 2 : 3);
  const uint32_t *words = static_cast<const uint32_t *>(m.zeros);
  const uint32_t mask = (1u << bits) - 1;
  switch (m.zero_type) {
    case WL_Z_ROWS: return float((words[word * m.zero_stride + group] >> place) & mask);
    case WL_Z_GPTQ: {
      const uint32_t z = (words[group * m.zero_stride + word] >> place) & mask;
      return float((z + uint32_t(m.zero_add)) & mask);  // AutoGPTQ stores a zero of 0 as the largest code
    }
    case WL_Z_AWQ: return float((words[group * m.zero_stride + word] >> (4 * AWQ_ORDER[n % 8])) & 15);
    default: return load_plain_zero(m.code);
  }
}

/// 2 to the (byte - 127), the byte in the low bits of each lane; 255 means NaN.
inline V decode_e8m0(VI byte) {
  const V low = as_float(i_set(0x00400000)), x = as_float(i_shl<23>(byte));  // 2^-127 is denormal
  return where_equal(byte, i_set(255), as_float(i_set(0x7fc00000)), where_equal(byte, i_set(0), low, x));
}

constexpr int scale_bytes(int type) { return type == WL_S_F32 ? 4 : type == WL_S_E8M0 ? 1 : 2; }

/// The first `count` of W scales that lie side by side; no others are read.
template <int TYPE>
[[gnu::always_inline]] inline V load_scales_as(const void *scales, int64_t at, int64_t count = W) {
  const VI raw = load_some<W * scale_bytes(TYPE)>(static_cast<const uint8_t *>(scales) + at * scale_bytes(TYPE), int(count) * scale_bytes(TYPE));
  if constexpr (TYPE == WL_S_F32) return as_float(raw);
  else if constexpr (TYPE == WL_S_BF16) return as_float(i_shl<16>(low_halves(raw)));
  else if constexpr (TYPE == WL_S_F16) return half_to_float(low_halves(raw));
  else return decode_e8m0(low_bytes(raw));
}

/// f<TYPE>() for the type of a matrix's scales, where it has any.
template <class F>
[[gnu::always_inline]] inline void with_scales(const wl_matrix &m, F f) {
  switch (m.scale_type) {
    case WL_S_F32: return f.template operator()<WL_S_F32>();
    case WL_S_BF16: return f.template operator()<WL_S_BF16>();
    case WL_S_F16: return f.template operator()<WL_S_F16>();
    case WL_S_E8M0: return f.template operator()<WL_S_E8M0>();
  }
}

/// W scales that lie side by side.
inline V load_scales(const wl_matrix &m, int64_t at) {
  V scales = v_set(1.0f);
  with_scales(m, [&]<int TYPE>() { scales = load_scales_as<TYPE>(m.scales, at); });
  return scales;
}

/// Where the nibble of column n of words along n begins.
struct Nibbles {
  int32_t plain[W], awq[W];
};
constexpr Nibbles NIBBLES = [] {
  Nibbles all{};
  for (int i = 0; i < W; i++) all.plain[i] = 4 * (i % 8), all.awq[i] = 4 * AWQ_ORDER[i % 8];
  return all;
}();

/// Scale and zero of W columns for each group of a range of k.
struct Groups {
  float *scale, *zero;  // [group - first][W]
  int64_t first = 0;

  /// Those of W columns from n (a multiple of W) on, for one group; the last column is repeated.
  static void one(const wl_matrix &m, int64_t n, int64_t g, V &scale, V &zero) {
    const bool full = n + W <= m.n, beside = full && m.block_n == 1 && m.scale_stride_n == 1;
    int64_t columns[W];
    for (int i = 0; i < W; i++) columns[i] = std::min(n + i, m.n - 1);
    if (beside) {
      scale = load_scales(m, n + g * m.scale_stride_k);
    } else {
      float lanes[W];
      for (int i = 0; i < W; i++) load_scales_apart(m, columns[i] / m.block_n * m.scale_stride_n + g * m.scale_stride_k, 1, 1, lanes + i);
      scale = v_load(lanes);
    }
    zero = zeros_of(m, columns, beside, g);
  }

  /// `full`: the columns follow each other, the first a multiple of W.
  void fill(const wl_matrix &m, const int64_t columns[W], bool full, int64_t first_group, int64_t last_group) {
    first = first_group;
    full = full && m.block_n == 1;
    for (int64_t g = first_group; g <= last_group; g += W) {
      const int64_t num = last_group - g + 1 < W ? last_group - g + 1 : W;
      fill_scales(m, columns, full, g, num);
      for (int64_t i = g; i < g + num; i++) v_store(zero + (i - first) * W, zeros_of(m, columns, full, i));
    }
  }

  /// Fetches what is stored with the scales of `rows` rows from n on, where they lie row by row: all of it misses
  /// when it is read, and nothing is multiplied meanwhile.
  static void fetch(const wl_matrix &m, int64_t n, int64_t rows) {
    if (m.block_n != 1 || m.scale_stride_k != 1 || n + rows > m.n) return;
    const int64_t row = m.scale_stride_n * scale_bytes(m.scale_type);
    fetch_lines(static_cast<const uint8_t *>(m.scales) + n * row, rows * row);
    const int64_t per = codes_per_word(m.code), words = m.zero_stride * 4;
    if (m.zero_type == WL_Z_ROWS && n % per == 0)
      fetch_lines(static_cast<const uint8_t *>(m.zeros) + n / per * words, (rows + per - 1) / per * words);
  }

 private:
  void fill_scales(const wl_matrix &m, const int64_t columns[W], bool full, int64_t g, int64_t num) {
    float *to = scale + (g - first) * W;
    if (full && m.scale_stride_n == 1 && m.scale_stride_k != 1) {
      for (int64_t i = 0; i < num; i++) v_store(to + i * W, load_scales(m, columns[0] + (g + i) * m.scale_stride_k));
      return;
    }
    VI r[W];
    auto load = [&](auto row_at) __attribute__((always_inline)) {
      // no division where it can be helped: there are as many as lines of codes
      for (int i = 0; i < W; i++) r[i] = row_at((m.block_n == 1 ? columns[i] : columns[i] / m.block_n) * m.scale_stride_n + g * m.scale_stride_k);
    };
    if (m.scale_stride_k == 1)
      with_scales(m, [&]<int TYPE>() __attribute__((always_inline)) {
        load([&](int64_t at) __attribute__((always_inline)) { return as_int(load_scales_as<TYPE>(m.scales, at, num)); });
      });
    else
      load([&](int64_t at) {
        alignas(64) float row[W];
        load_scales_apart(m, at, m.scale_stride_k, num, row);
        return i_load(row);
      });
    transpose(r);
    for (int64_t i = 0; i < num; i++) v_store(to + i * W, as_float(r[i]));
  }

  static V zeros_of(const wl_matrix &m, const int64_t columns[W], bool full, int64_t g) {
    if (m.zero_type == WL_Z_NONE) return v_set(load_plain_zero(m.code));
    const bool nibbles = m.zero_type == WL_Z_AWQ || (m.zero_type == WL_Z_GPTQ && m.code != WL_INT8);
    if (full && nibbles) {
      const VI shifts = i_load(m.zero_type == WL_Z_AWQ ? NIBBLES.awq : NIBBLES.plain);
      const VI words = spread(static_cast<const int32_t *>(m.zeros) + g * m.zero_stride + columns[0] / 8);
      const VI code = i_and(i_shrv(words, shifts), i_set(15));
      return to_float(m.zero_type == WL_Z_AWQ ? code : i_and(i_add(code, i_set(int32_t(m.zero_add))), i_set(15)));
    }
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = load_zero(m, columns[i] / m.block_n, g);
    return v_load(lanes);
  }
};

/// Where vectors of a panel go: that of code i of word j at j * word + i, the next W words at `next`.
struct Steps {
  int word, next;
};

/// Codes of W columns of one k: the scale and zero of their group.
struct GroupAt {
  const wl_matrix &m;
  const Groups &groups;
  int64_t group = 0, next = -1;  // next: k at which another group begins, where they follow k
  V scale = v_zero(), zero = v_zero();
  /// k: ascending, of every group or of all k
  [[gnu::always_inline]] void move(int64_t k) {
    if (!m.groups && k < next) return;
    group = m.groups ? m.groups[k] : next < 0 ? k / m.block_k : group + 1;  // no division where it can be helped
    next = (group + 1) * m.block_k;
    scale = v_load(groups.scale + (group - groups.first) * W);
    zero = v_load(groups.zero + (group - groups.first) * W);
  }
  V weight(V code) const { return v_mul(v_sub(code, zero), scale); }
};

/// W rows at `rows` + offset: W words of each, as codes_per_word * W vectors. Columns from `end` on do
/// not exist: nothing is looked up for them. EACH: neighbours may be of different groups. UNROLLED: a
/// tenth faster, and slow to compile.
template <int CODE, bool ZERO, bool EACH, bool UNROLLED>
[[gnu::always_inline]] inline void unpack_words(const uint8_t *const rows[W], int64_t offset, float *dst, Steps steps, int64_t k, int64_t end,
                                                GroupAt &group) {
  constexpr int PER = codes_per_word(CODE);
  VI r[W];
  for (int i = 0; i < W; i++) r[i] = i_load(rows[i] + offset);
  transpose(r);
  auto word = [&](int i) __attribute__((always_inline)) {
    const Words<CODE, ZERO> words(r[i]);
    if (has_scales(CODE) && !EACH && k + i * PER < end) group.move(k + i * PER);
    each<PER>([&](auto j) __attribute__((always_inline)) {
      if (EACH && k + i * PER + j() < end) group.move(k + i * PER + j());
      const V zero = ZERO ? group.zero : v_set(load_plain_zero(CODE));
      v_store(dst + int64_t(i * steps.word + j()) * NR, weight_of<CODE, ZERO, j()>(words, group.scale, zero));
    });
  };
  if constexpr (UNROLLED) each<W>(word);
  else for (int i = 0; i < W; i++) word(i);
}

/// W columns whose codes are contiguous in k. Few rows at once: the hardware follows 16 streams, not
/// 32 (36 against 19 GB/s for one thread of a Zen 5).
template <int CODE, bool ZERO, bool EACH>
[[gnu::noinline]] inline void unpack_rows(const uint8_t *const rows[W], int64_t k0, int count, float *dst, Steps steps,
                                          const wl_matrix &m, const Groups &groups) {
  constexpr int PER = codes_per_word(CODE), STRIPE = PER * W;
  GroupAt group{m, groups};
  int k = 0;
  auto whole = [&]<bool UNROLLED>(Steps known) __attribute__((always_inline)) {
    for (; k + STRIPE <= count; k += STRIPE, dst += known.next * NR)
      unpack_words<CODE, ZERO, EACH, UNROLLED>(rows, (k0 + k) * 4 / PER, dst, known, k0 + k, k0 + count, group);
  };
  // constants where they can be: addresses cost as much as the transposition
  if (steps.word == PER) whole.template operator()<false>({PER, STRIPE});
  else if (count == KC) whole.template operator()<!EACH>({KC / W, PER});
  else whole.template operator()<false>(steps);
  if (k == count) return;
  // a ragged end: only bytes that exist are read, only columns that exist are written
  alignas(64) uint8_t copy[W][W * 4] = {};
  alignas(64) float tail[STRIPE * NR];
  const uint8_t *ends[W];
  const int bytes = ((count - k) * 4 + PER - 1) / PER;
  for (int i = 0; i < W; i++) {
    std::memcpy(copy[i], rows[i] + (k0 + k) * 4 / PER, size_t(bytes));
    ends[i] = copy[i];
  }
  unpack_words<CODE, ZERO, EACH, false>(ends, 0, tail, {PER, STRIPE}, k0 + k, k0 + count, group);
  for (int i = 0; i < STRIPE && k + i < count; i++)
    v_store(dst + int64_t(i / PER * steps.word + i % PER) * NR, v_load(tail + i * NR));
}

inline void unpack_rows_of(const uint8_t *const rows[W], int64_t k0, int count, float *dst, Steps steps,
                           const wl_matrix &m, const Groups &groups) {
  with_code(m, [&]<int CODE, bool ZERO>() {
    if (has_scales(CODE) && m.groups) unpack_rows<CODE, ZERO, has_scales(CODE)>(rows, k0, count, dst, steps, m, groups);
    else unpack_rows<CODE, ZERO, false>(rows, k0, count, dst, steps, m, groups);
  });
}

}  // namespace WL_NS
