// bf16 rows times bf16 columns, two at a time, where the processor multiplies them (AVX512-BF16).
// Weights of other types are rounded to bf16 on the way into a panel.
#pragma once

#include "products.h"

namespace WL_NS {

/// One pair in each lane: low in even, high in odd places.
inline VI to_pairs(V low, V high) {
  alignas(64) static constexpr uint16_t PLACES[2 * W] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(PLACES), (VI)_mm512_cvtne2ps_pbh(high, low));
}

struct Pairs {
  static constexpr int UNIT = 2;
  static constexpr bool LANES = false;
  /// In ascending order: adding up chains of half as many steps would cost a quarter at 8 rows.
  static Chains chains(const wl_matrix &) { return {0}; }
  static int places(int count, Chains) { return (count + 1) / 2; }

  static void pack(const float *const *rows, int mr, Part part, float *dst, Chains) {
    const __mmask16 lanes = __mmask16((1u << mr) - 1);
    for (int64_t k = 0; k < part.count; k += 2 * W) {
      VI r[W];
      for (int i = 0; i < W; i++) r[i] = i < mr ? load_pairs(rows[i] + k, part.count - k) : i_set(0);
      transpose(r);
      for (int i = 0; i < W && k + 2 * i < part.count; i++)
        _mm512_mask_storeu_epi32(dst + ((part.first + k) / 2 + i) * mr, lanes, r[i]);
    }
  }

  static void unpack(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch, Chains chains) {
    if (has_pairs(m)) return unpack_pairs(m, n0, k0, count, panel, {1, W});
    alignas(64) float wide[(KC + 1) * NR];
    unpack_panel(m, n0, k0, count, wide, scratch, chains);
    if (count % 2) std::memset(wide + count * NR, 0, NR * 4);
    for (int k = 0; k < count; k += 2)
      for (int v = 0; v < NV; v++) {
        const float *pair = wide + k * NR + v * W;
        _mm512_storeu_si512(panel + k / 2 * NR + v * W, to_pairs(v_load(pair), v_load(pair + NR)));
      }
  }

  using Column = __m512bh;
  static Column column(const float *p) { return (__m512bh)i_load(p); }
  static __m512bh element(const float *p) { return (__m512bh)i_set1(p); }
  static V add(__m512bh x, Column w, V sum) { return _mm512_dpbf16_ps(sum, x, w); }
  template <int M>
  static void tile(const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead, Chains, bool) {
    tile_in_order<Pairs, M>(rows, panel, (count + 1) / 2, c, fresh, ahead);
  }

  /// Up to 2 W floats as pairs.
  static VI load_pairs(const float *from, int64_t count) {
    float lanes[2 * W] = {};
    if (count < 2 * W) {
      std::memcpy(lanes, from, size_t(count) * 4);
      from = lanes;
    }
    return (VI)_mm512_cvtne2ps_pbh(v_load(from + W), v_load(from));
  }

 private:
  static VI i_set1(const float *p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return i_set(word);
  }
};

}  // namespace WL_NS
