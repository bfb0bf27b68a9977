// One vector of fp32 and what the kernels do with it, for the instruction set that the including
// file was compiled for. W lanes; NR = NV * W columns of a panel; MR rows of a micro tile.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace WL_NS {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

using V = __m512;
using VI = __m512i;
constexpr int W = 16;
#if defined(WL_MR)
constexpr int MR = WL_MR;
#else
constexpr int MR = 12;  // 24 sums, 2 columns, 1 row element: 27 of 32 registers
#endif

inline V v_zero() { return _mm512_setzero_ps(); }
inline V v_set(float x) { return _mm512_set1_ps(x); }
inline V v_load(const float *p) { return _mm512_loadu_ps(p); }
inline void v_store(float *p, V x) { _mm512_storeu_ps(p, x); }
inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }
inline V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V v_div(V a, V b) { return _mm512_div_ps(a, b); }
inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V v_max(V a, V b) { return _mm512_max_ps(a, b); }
inline V v_min(V a, V b) { return _mm512_min_ps(a, b); }
inline V v_round(V x) { return _mm512_roundscale_ps(x, 8); }
inline VI i_load(const void *p) { return _mm512_loadu_si512(p); }
inline VI i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline VI i_and(VI a, VI b) { return _mm512_and_si512(a, b); }
inline VI i_or(VI a, VI b) { return _mm512_or_si512(a, b); }
/// (a & b) | c
inline VI i_and_or(VI a, VI b, VI c) { return _mm512_ternarylogic_epi32(a, b, c, 0xea); }
inline VI i_add(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI i_sub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
template <int N> inline VI i_shl(VI a) { return _mm512_slli_epi32(a, N); }
template <int N> inline VI i_shr(VI a) { return _mm512_srli_epi32(a, N); }
inline VI i_half(VI a) { return _mm512_srai_epi32(a, 1); }
inline VI i_shr_by(VI a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline VI i_shrv(VI a, VI n) { return _mm512_srlv_epi32(a, n); }
inline V as_float(VI a) { return _mm512_castsi512_ps(a); }
inline VI as_int(V a) { return _mm512_castps_si512(a); }
inline V to_float(VI a) { return _mm512_cvtepi32_ps(a); }
inline VI to_int(V a) { return _mm512_cvtps_epi32(a); }
/// fp16 in the low half of each lane.
inline V half_to_float(VI a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
/// fp16, W of them side by side.
inline V load_f16(const void *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
}
inline V load_bf16(const void *p) {
  return as_float(i_shl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i *>(p)))));
}
inline VI load_bytes(const void *p) {  // W bytes to W lanes
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}
/// The first `count` bytes of SIZE; zeros behind them.
template <int SIZE>
[[gnu::always_inline]] inline VI load_some(const void *p, int count) {
  if (count == SIZE) {
    if (SIZE == 64) return i_load(p);
    if (SIZE == 32) return _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
    return _mm512_zextsi128_si512(_mm_loadu_si128(static_cast<const __m128i *>(p)));
  }
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, p);
}
inline VI low_halves(VI a) { return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(a)); }
inline VI low_bytes(VI a) { return _mm512_cvtepu8_epi32(_mm512_castsi512_si128(a)); }
/// W / 8 words, each in eight lanes.
inline VI spread(const int32_t *words) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(words[0])), _mm256_set1_epi32(words[1]), 1);
}
inline V where_equal(VI a, VI b, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(a, b), no, yes);
}
inline V where_less(VI a, VI b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(a, b), no, yes); }
inline V permute(V x, VI from) { return _mm512_permutexvar_ps(from, x); }
inline V where_nan(V x, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), no, yes); }
inline V lookup16(VI index, const float *table) {
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}

/// Transposes W vectors of W 32-bit lanes.
[[gnu::always_inline]] inline void transpose(VI r[W]) {
  VI t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

/// Lane c: the lanes of r[c], added up as a tree, neighbours first.
[[gnu::always_inline]] inline V add_lanes(const V r[W]) {
  auto join = [](V a, V b) { return v_add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); };
  auto join_fours = [](V a, V b) { return v_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  V four[4];
  for (int i = 0; i < 4; i++) four[i] = join(join(r[4 * i], r[4 * i + 1]), join(r[4 * i + 2], r[4 * i + 3]));
  return join_fours(join_fours(four[0], four[1]), join_fours(four[2], four[3]));
}

/// The first `count` lanes.
inline void store_some(float *p, VI x, int count) {
  _mm512_mask_storeu_epi32(p, __mmask16((1u << count) - 1), x);
}

#else  // AVX2, FMA, F16C

using V = __m256;
using VI = __m256i;
constexpr int W = 8;
constexpr int MR = 6;  // 12 sums, 2 columns, 1 row element: 15 of 16 registers

inline V v_zero() { return _mm256_setzero_ps(); }
inline V v_set(float x) { return _mm256_set1_ps(x); }
inline V v_load(const float *p) { return _mm256_loadu_ps(p); }
inline void v_store(float *p, V x) { _mm256_storeu_ps(p, x); }
inline V v_add(V a, V b) { return _mm256_add_ps(a, b); }
inline V v_sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V v_div(V a, V b) { return _mm256_div_ps(a, b); }
inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V v_max(V a, V b) { return _mm256_max_ps(a, b); }
inline V v_min(V a, V b) { return _mm256_min_ps(a, b); }
inline V v_round(V x) { return _mm256_round_ps(x, 8); }
inline VI i_load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline VI i_set(int32_t x) { return _mm256_set1_epi32(x); }
inline VI i_and(VI a, VI b) { return _mm256_and_si256(a, b); }
inline VI i_or(VI a, VI b) { return _mm256_or_si256(a, b); }
inline VI i_and_or(VI a, VI b, VI c) { return i_or(i_and(a, b), c); }
inline VI i_add(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI i_sub(VI a, VI b) { return _mm256_sub_epi32(a, b); }
template <int N> inline VI i_shl(VI a) { return _mm256_slli_epi32(a, N); }
template <int N> inline VI i_shr(VI a) { return _mm256_srli_epi32(a, N); }
inline VI i_half(VI a) { return _mm256_srai_epi32(a, 1); }
inline VI i_shr_by(VI a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline VI i_shrv(VI a, VI n) { return _mm256_srlv_epi32(a, n); }
inline V as_float(VI a) { return _mm256_castsi256_ps(a); }
inline VI as_int(V a) { return _mm256_castps_si256(a); }
inline V to_float(VI a) { return _mm256_cvtepi32_ps(a); }
inline VI to_int(V a) { return _mm256_cvtps_epi32(a); }
inline V half_to_float(VI a) {
  VI low = i_and(a, i_set(0xffff));
  VI packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
inline V load_f16(const void *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}
inline V load_bf16(const void *p) {
  return as_float(i_shl<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)))));
}
inline VI load_bytes(const void *p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i *>(p)));
}
template <int SIZE>
[[gnu::always_inline]] inline VI load_some(const void *p, int count) {
  alignas(32) uint8_t bytes[32] = {};
  if (count == SIZE) std::memcpy(bytes, p, SIZE);
  else std::memcpy(bytes, p, size_t(count));
  return i_load(bytes);
}
inline VI low_halves(VI a) { return _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)); }
inline VI low_bytes(VI a) { return _mm256_cvtepu8_epi32(_mm256_castsi256_si128(a)); }
inline VI spread(const int32_t *words) { return _mm256_set1_epi32(words[0]); }
inline V where_equal(VI a, VI b, V yes, V no) {
  return _mm256_blendv_ps(no, yes, as_float(_mm256_cmpeq_epi32(a, b)));
}
inline V where_less(VI a, VI b, V yes, V no) { return _mm256_blendv_ps(no, yes, as_float(_mm256_cmpgt_epi32(b, a))); }
inline V permute(V x, VI from) { return _mm256_permutevar8x32_ps(x, from); }
inline V where_nan(V x, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
inline V lookup16(VI index, const float *table) {
  V low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  V high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, as_float(i_shl<28>(index)));
}

[[gnu::always_inline]] inline void transpose(VI r[W]) {
  VI t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

[[gnu::always_inline]] inline V add_lanes(const V r[W]) {
  auto join = [](V a, V b) { return v_add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)); };
  const V low = join(join(r[0], r[1]), join(r[2], r[3])), high = join(join(r[4], r[5]), join(r[6], r[7]));
  return v_add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

inline void store_some(float *p, VI x, int count) {
  float lanes[W];
  v_store(lanes, as_float(x));
  for (int i = 0; i < count; i++) p[i] = lanes[i];
}

#endif

constexpr int NV = 2;
constexpr int NR = NV * W;

/// To the nearest bf16, ties to even; NaN stays NaN.
inline V round_bf16(V x) {
  const VI bits = as_int(x), odd = i_and(i_shr<16>(bits), i_set(1));
  const VI up = i_and(i_add(bits, i_add(odd, i_set(0x7fff))), i_set(int32_t(0xffff0000)));
  return where_nan(x, x, as_float(up));
}

/// e to the x: relative error below 2e-7; 0 below -87.3, infinite above 88.8.
inline V v_exp(V x) {
  // max and min return their second operand where one is NaN, so that NaN passes
  V y = v_min(v_set(89.5f), v_max(v_set(-104.0f), x));
  V n = v_round(v_mul(y, v_set(1.44269504f)));
  V r = v_fma(n, v_set(-0.693359375f), y);
  r = v_fma(n, v_set(2.12194440e-4f), r);
  V p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_add(v_fma(v_mul(r, r), p, r), v_set(1.0f));
  // 2^n in two factors: n reaches -150, and 128
  VI whole = to_int(n);
  VI half = i_half(whole);
  VI rest = i_sub(whole, half);
  V a = as_float(i_shl<23>(i_add(half, i_set(127))));
  V b = as_float(i_shl<23>(i_add(rest, i_set(127))));
  return v_mul(v_mul(p, a), b);
}

inline V v_sigmoid(V x) { return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)))); }

/// The lanes joined by `join`, those half a vector apart first.
template <class F>
[[gnu::always_inline]] inline float join_lanes(V x, F join) {
#if defined(__AVX512F__)
  x = join(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  x = join(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  x = join(x, _mm512_shuffle_ps(x, x, 0x4e));
  return _mm512_cvtss_f32(join(x, _mm512_shuffle_ps(x, x, 0xb1)));
#else
  x = join(x, _mm256_permute2f128_ps(x, x, 0x01));
  x = join(x, _mm256_shuffle_ps(x, x, 0x4e));
  return _mm256_cvtss_f32(join(x, _mm256_shuffle_ps(x, x, 0xb1)));
#endif
}

inline float v_sum(V x) { return join_lanes(x, v_add); }
inline float v_top(V x) { return join_lanes(x, v_max); }

/// Starts to bring a line into the second-level cache (or the first). gcc 12 removes loops that do nothing
/// else unless something volatile is in them (attention at 7 instead of 17 GB/s).
template <_mm_hint HINT = _MM_HINT_T1>
inline void fetch_line(const uint8_t *p) {
  asm volatile("" ::"r"(p));
  _mm_prefetch(reinterpret_cast<const char *>(p), HINT);
}

/// The lines of `bytes` from there on, into the first-level cache.
inline void fetch_lines(const uint8_t *from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) fetch_line<_MM_HINT_T0>(from + at);
}

}  // namespace WL_NS
