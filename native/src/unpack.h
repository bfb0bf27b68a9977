// Stored weights to fp32 panels. A panel holds NR columns n of up to KC consecutive k as
// panel[k][NR]; columns beyond the matrix repeat its last one. Matrices whose rows are contiguous
// are transposed in registers: 32 bits of W rows at a time, one to eight codes each.
#pragma once

#include <algorithm>

#include "../include/windlass_cpu.h"
#include "simd.h"

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

/// The format's own zero.
inline float load_plain_zero(int code) { return code == WL_INT4 ? 8.0f : code == WL_INT8 ? 128.0f : 0.0f; }

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

constexpr float FP4[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

constexpr float INT4[16] = {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f,
                            0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f};

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

/// `count` scales of row n of scales, from `group` on.
inline void row_of_scales(const wl_matrix &m, int64_t n, int64_t group, int64_t count, float *to) {
  int64_t i = 0;
  for (; m.scale_stride_k == 1 && i + W <= count; i += W) v_store(to + i, load_scales(m, n * m.scale_stride_n + group + i));
  if (i < count) load_scales_apart(m, n * m.scale_stride_n + (group + i) * m.scale_stride_k, m.scale_stride_k, count - i, to + i);
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
      for (int i = 0; i < W; i++) row_of_scales(m, columns[i] / m.block_n, g, 1, lanes + i);
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

 private:
  void fill_scales(const wl_matrix &m, const int64_t columns[W], bool full, int64_t g, int64_t num) {
    float *to = scale + (g - first) * W;
    if (full && m.scale_stride_n == 1 && m.scale_stride_k != 1) {
      for (int64_t i = 0; i < num; i++) v_store(to + i * W, load_scales(m, columns[0] + (g + i) * m.scale_stride_k));
      return;
    }
    alignas(64) float rows[W][W];
    VI r[W];
    for (int i = 0; i < W; i++) {
      row_of_scales(m, columns[i] / m.block_n, g, num, rows[i]);
      r[i] = i_load(rows[i]);
    }
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

inline V decode_e4m3(VI byte) {  // in the low 8 bits of each lane
  VI low = i_and(byte, i_set(0x7f));
  VI half = i_or(i_shl<7>(low), i_shl<8>(i_and(byte, i_set(0x80))));
  V x = v_mul(half_to_float(half), v_set(256.0f));
  return where_equal(low, i_set(0x7f), v_set(__builtin_nanf("")), x);
}

#if defined(__AVX512BW__)
struct Halves {
  alignas(64) uint16_t bf16[128];
};

/// Every positive e4m3 as bf16, which holds it exactly.
constexpr Halves E4M3 = [] {
  Halves all{};
  for (int code = 0; code < 128; code++) {
    int power = code >> 3, low = code & 7;
    if (power == 0) {  // denormal: low / 512
      for (power = 1; low && low < 8; low *= 2) power--;
      low &= 7;
    }
    all.bf16[code] = uint16_t(code == 0 ? 0 : code == 0x7f ? 0x7fc0 : (power + 120) << 7 | low << 4);
  }
  return all;
}();

/// Byte i of each lane. Two bytes of a lane are looked up at once (a third of what integers take).
inline V e4m3_of_word(VI r, int i) {
  const VI code = i % 2 ? i_shr<8>(r) : r;
  auto look_up = [&](const uint16_t *table) { return _mm512_permutex2var_epi16(i_load(table), code, i_load(table + 32)); };
  const __mmask32 large = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
  const VI value = _mm512_mask_blend_epi16(large, look_up(E4M3.bf16), look_up(E4M3.bf16 + 64));
  const VI both = i_and_or(i_shl<8>(code), i_set(int32_t(0x80008000)), value);
  return as_float(i < 2 ? i_shl<16>(both) : i_and(both, i_set(int32_t(0xffff0000))));
}
#else
inline V e4m3_of_word(VI r, int i) { return decode_e4m3(i_and(i_shr_by(r, 8 * i), i_set(0xff))); }
#endif

inline V decode_code(int code, VI bits, V zero) {
  switch (code) {
    case WL_E2M1: return lookup16(bits, FP4);
    default: return v_sub(to_float(bits), zero);
  }
}

constexpr int codes_per_word(int code) {
  return code == WL_F32 ? 1 : code == WL_BF16 || code == WL_F16 ? 2
       : code == WL_E4M3 || code == WL_INT8 ? 4 : 8;
}

/// Where vectors of a panel go: that of code i of word j at j * word + i, the next W words at `next`.
struct Steps {
  int word, next;
};

/// W rows at `rows` + offset: W words of each, as codes_per_word * W vectors. Columns from `end` on do
/// not exist: nothing is looked up for them.
template <int CODE>
[[gnu::always_inline]] inline void unpack_words(const uint8_t *const rows[W], int64_t offset, float *dst, Steps steps, int64_t k, int64_t end,
                         const wl_matrix *m, const Groups &groups) {
  constexpr int PER = codes_per_word(CODE);
  auto put = [&](int i, int j, V x) { v_store(dst + int64_t(i * steps.word + j) * NR, x); };
  VI r[W];
  for (int i = 0; i < W; i++) r[i] = i_load(rows[i] + offset);
  transpose(r);
  if constexpr (CODE == WL_F32) {
    for (int i = 0; i < W; i++) put(i, 0, as_float(r[i]));
  } else if constexpr (CODE == WL_BF16) {
    const VI high = i_set(int32_t(0xffff0000));
    for (int i = 0; i < W; i++) {
      put(i, 0, as_float(i_shl<16>(r[i])));
      put(i, 1, as_float(i_and(r[i], high)));
    }
  } else if constexpr (CODE == WL_F16) {
    for (int i = 0; i < W; i++) {
      put(i, 0, half_to_float(r[i]));
      put(i, 1, half_to_float(i_shr<16>(r[i])));
    }
  } else {
    constexpr int BITS = 32 / PER;
    const VI mask = i_set((1 << BITS) - 1);
    V scale = v_set(1.0f), zero = v_zero();
    for (int i = 0; i < W; i++) {
      if (!m->groups && k + i * PER < end) {  // groups are never narrower than a word
        int64_t g = (k + i * PER) / m->block_k - groups.first;
        scale = v_load(groups.scale + g * W);
        zero = v_load(groups.zero + g * W);
      }
      for (int j = 0; j < PER; j++) {
        if (m->groups) {
          int64_t g = k + i * PER + j < end ? m->groups[k + i * PER + j] - groups.first : 0;
          scale = v_load(groups.scale + g * W);
          zero = v_load(groups.zero + g * W);
        }
        V code;
        if constexpr (CODE == WL_E4M3) code = e4m3_of_word(r[i], j);
        else code = decode_code(CODE, i_and(i_shr_by(r[i], j * BITS), mask), zero);
        put(i, j, v_mul(code, scale));
      }
    }
  }
}

/// W columns whose codes are contiguous in k. Few rows at once: the hardware follows 16 streams, not
/// 32 (36 against 19 GB/s for one thread of a Zen 5).
template <int CODE>
inline void unpack_rows(const uint8_t *const rows[W], int64_t k0, int count, float *dst, Steps steps,
                        const wl_matrix *m, const Groups &groups) {
  constexpr int PER = codes_per_word(CODE), STRIPE = PER * W;
  int k = 0;
  auto whole = [&](Steps known) __attribute__((always_inline)) {
    for (; k + STRIPE <= count; k += STRIPE, dst += known.next * NR)
      unpack_words<CODE>(rows, (k0 + k) * 4 / PER, dst, known, k0 + k, k0 + count, m, groups);
  };
  // constants where they can be: addresses cost as much as the transposition
  if (steps.word == PER) whole({PER, STRIPE});
  else if (count == KC) whole({KC / W, PER});
  else whole(steps);
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
  unpack_words<CODE>(ends, 0, tail, {PER, STRIPE}, k0 + k, k0 + count, m, groups);
  for (int i = 0; i < STRIPE && k + i < count; i++)
    v_store(dst + int64_t(i / PER * steps.word + i % PER) * NR, v_load(tail + i * NR));
}

inline void unpack_rows_of(int code, const uint8_t *const rows[W], int64_t k0, int count, float *dst, Steps steps,
                           const wl_matrix *m, const Groups &groups) {
  switch (code) {
    case WL_F32: return unpack_rows<WL_F32>(rows, k0, count, dst, steps, m, groups);
    case WL_BF16: return unpack_rows<WL_BF16>(rows, k0, count, dst, steps, m, groups);
    case WL_F16: return unpack_rows<WL_F16>(rows, k0, count, dst, steps, m, groups);
    case WL_E4M3: return unpack_rows<WL_E4M3>(rows, k0, count, dst, steps, m, groups);
    case WL_E2M1: return unpack_rows<WL_E2M1>(rows, k0, count, dst, steps, m, groups);
    case WL_INT8: return unpack_rows<WL_INT8>(rows, k0, count, dst, steps, m, groups);
    case WL_INT4: return unpack_rows<WL_INT4>(rows, k0, count, dst, steps, m, groups);
  }
}

}  // namespace WL_NS
