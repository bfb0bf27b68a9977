// bf16 rows times bf16 columns, two at a time, where the processor multiplies them (AVX512-BF16).
// Weights of other types are rounded to bf16 on the way into a panel.
#pragma once

#include "products.h"

namespace WL_NS {

inline VI to_pairs(V low, V high) {  // low in even, high in odd places: one pair in each lane
  VI a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  VI b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  return i_or(a, i_shl<16>(b));
}

struct Pairs {
  static constexpr int UNIT = 2, ROUND = 1;

  static void pack(const float *const *rows, int mr, int64_t count, float *dst) {
    const int64_t units = (count + 1) / 2;
    for (int64_t k = 0; k < count; k += 2 * W) {
      VI r[W];
      for (int i = 0; i < W; i++) {
        float lanes[2 * W] = {};
        const float *from = i < mr ? rows[i] + k : lanes;
        if (i < mr && k + 2 * W > count) {
          std::memcpy(lanes, rows[i] + k, size_t(count - k) * 4);
          from = lanes;
        }
        r[i] = (VI)_mm512_cvtne2ps_pbh(v_load(from + W), v_load(from));
      }
      transpose(r);
      for (int i = 0; i < W && k / 2 + i < units; i++) {
        const __mmask16 lanes = __mmask16((1u << mr) - 1);
        _mm512_mask_storeu_epi32(dst + (k / 2 + i) * mr, lanes, r[i]);
      }
    }
  }

  static void unpack(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch) {
    if (m.code == WL_BF16 && has_contiguous_rows(m)) return unpack_bf16(m, n0, k0, count, panel);
    alignas(64) float wide[(KC + 1) * NR];
    unpack_panel(m, n0, k0, count, wide, scratch);
    if (count % 2) std::memset(wide + count * NR, 0, NR * 4);
    for (int k = 0; k < count; k += 2)
      for (int v = 0; v < NV; v++) {
        const float *pair = wide + k * NR + v * W;
        _mm512_storeu_si512(panel + k / 2 * NR + v * W, to_pairs(v_load(pair), v_load(pair + NR)));
      }
  }

  template <int M>
  static void tile(const float *rows, const float *panel, int units, float *c, bool fresh, const Ahead &ahead) {
    V sum[M][NV];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) sum[m][v] = v_zero();
    auto step = [&](int k) {
      __m512bh w[NV];
      for (int v = 0; v < NV; v++) w[v] = (__m512bh)i_load(panel + int64_t(k) * NR + v * W);
      for (int m = 0; m < M; m++) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(as_word(rows[int64_t(k) * M + m]));
        for (int v = 0; v < NV; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], x, w[v]);
      }
    };
    constexpr int STEP = KSTEP / UNIT;
    int k = 0;
    for (; k + STEP <= units; k += STEP) {
      ahead.fetch(k / STEP);
#pragma GCC unroll 4
      for (int i = 0; i < STEP; i++) step(k + i);
    }
    for (; k < units; k++) step(k);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) {
        float *p = c + m * NR + v * W;
        v_store(p, fresh ? sum[m][v] : v_add(v_load(p), sum[m][v]));
      }
  }

 private:
  static int32_t as_word(float x) {
    int32_t word;
    std::memcpy(&word, &x, 4);
    return word;
  }

  /// Pairs as they are stored, transposed.
  static void unpack_bf16(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel) {
    for (int v = 0; v < NV; v++) {
      const uint8_t *rows[W];
      for (int i = 0; i < W; i++) {
        const int64_t n = n0 + v * W + i < m.n ? n0 + v * W + i : m.n - 1;
        rows[i] = static_cast<const uint8_t *>(m.codes) + n * m.stride_n + 2 * k0;
      }
      for (int k = 0; k < count; k += 2 * W) {
        VI r[W];
        alignas(64) uint16_t ends[W][2 * W] = {};
        for (int i = 0; i < W; i++) {
          if (k + 2 * W <= count) {
            r[i] = i_load(rows[i] + 2 * k);
          } else {
            std::memcpy(ends[i], rows[i] + 2 * k, size_t(count - k) * 2);
            r[i] = i_load(ends[i]);
          }
        }
        transpose(r);
        for (int i = 0; i < W && k + 2 * i < count; i++) _mm512_storeu_si512(panel + (k / 2 + i) * NR + v * W, r[i]);
      }
    }
  }
};

}  // namespace WL_NS
