// Codes as weights: a vector of 32-bit words, each of one to eight codes, to one vector for each of them.
#pragma once

#include <utility>

#include "../include/windlass_cpu.h"
#include "simd.h"

namespace WL_NS {

constexpr int codes_per_word(int code) {
  return code == WL_F32 ? 1 : code == WL_BF16 || code == WL_F16 ? 2
       : code == WL_E4M3 || code == WL_INT8 ? 4 : 8;
}

constexpr bool has_scales(int code) { return codes_per_word(code) > 2; }

/// The format's own zero.
inline float load_plain_zero(int code) { return code == WL_INT4 ? 8.0f : code == WL_INT8 ? 128.0f : 0.0f; }

constexpr float FP4[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

constexpr float INT4[16] = {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f,
                            0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f};

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

/// f(0), f(1), ... as constants, below N.
template <int N, class F>
[[gnu::always_inline]] inline void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

/// Half of each word, with ones for an exponent: a code and some of those are the end of the mantissa of a
/// power of two, taken by one `and` (hidden from gcc, which would make it two operations for each code).
[[gnu::always_inline]] inline VI raise_half(VI words, int half) {
  VI raised = i_or(half ? i_shr<16>(words) : words, i_set(0x7f800000));
  asm("" : "+v"(raised));
  return raised;
}
template <int BITS>
constexpr int place_of(int i) { return i * BITS % 16; }
template <int BITS>
constexpr float power_of(int i) { return float(1 << (23 - place_of<BITS>(i))); }
template <int BITS, int I>
[[gnu::always_inline]] inline V raised_code(VI half) {
  constexpr int PLACE = place_of<BITS>(I);
  return as_float(i_and(half, i_set(((1 << BITS) - 1) << PLACE | (127 + 23 - PLACE) << 23)));
}

/// Whether codes are taken out by one `and`; those of int4 without zero points are looked up (a tenth faster from the cache).
constexpr bool is_raised(int code, bool zero) { return code == WL_INT8 || (code == WL_INT4 && zero); }

/// Words, with both halves raised where codes are taken out so.
template <int CODE, bool ZERO>
struct Words {
  VI low, high;
  Words() = default;
  [[gnu::always_inline]] explicit Words(VI r) : low(r), high(r) {
    if constexpr (is_raised(CODE, ZERO)) low = raise_half(r, 0), high = raise_half(r, 1);
  }
};

/// Code I of each word as a weight.
template <int CODE, bool ZERO, int I>
[[gnu::always_inline]] inline V weight_of(const Words<CODE, ZERO> &words, V scale, V zero) {
  const VI r = words.low;
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
  } else if constexpr (!is_raised(CODE, ZERO)) {
    return v_mul(lookup16(i_shr<I * BITS>(r), INT4), scale);
  } else {
    const V code = raised_code<BITS, I>(I * BITS < 16 ? r : words.high);
    return v_mul(v_sub(code, v_add(zero, v_set(power_of<BITS>(I)))), scale);
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

}  // namespace WL_NS
