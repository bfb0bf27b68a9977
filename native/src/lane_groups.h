// Scales and zero points of stored rows whose columns are contiguous, for lanes along k.
#pragma once

#include "panel.h"

namespace WL_NS {

constexpr int LANE_COLUMNS = 2048;                     // of k whose sums wait to be added up
constexpr int LANE_GROUPS = LANE_COLUMNS / 8 + 2 + W;  // scales of a stored row: a group has a word or more

/// Whether all stripes of W words have their groups in the same lanes.
inline bool has_even_groups(const wl_matrix &m) {
  const int stripe = W * codes_per_word(m.code);
  return !has_scales(m.code) || (!m.groups && (m.block_k % stripe == 0 || stripe % m.block_k == 0));
}

/// Scales and zeros of W stored rows of a matrix with even groups.
struct LaneGroups {
  const wl_matrix &m;
  float *scale, *zero;    // [stored row][LANE_GROUPS], from group `first` on
  VI pattern = i_set(0);  // of each word of a stripe: its group, counted from the stripe's first
  int64_t first = 0;
  int shift = -1;  // to divide by block_k: a division takes as long as a stripe

  LaneGroups(const wl_matrix &m, float *memory) : m(m), scale(memory), zero(memory + W * LANE_GROUPS) {
    if (!has_scales(m.code) || !std::has_single_bit(uint64_t(m.block_k))) return;
    shift = std::countr_zero(uint64_t(m.block_k));
    alignas(64) static constexpr int32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    pattern = i_shr_by(i_load(LANE), shift - std::countr_zero(unsigned(codes_per_word(m.code))));
  }

  int64_t group(int64_t k) const { return shift >= 0 ? k >> shift : k / m.block_k; }
  /// The group of column k, counted from the first that is filled in.
  int64_t at(int64_t k) const { return group(k) - first; }

  /// Of W rows from n0 (a multiple of W) on, for columns k0 .. k1.
  void fill(int64_t n0, int64_t k0, int64_t k1) {
    first = group(k0);
    const int64_t count = group(k1 - 1) - first + 1;
    fill_scales(n0, count);
    if (m.zero_type == WL_Z_ROWS) fill_zeros(n0, count);
    else if (m.zero_type != WL_Z_NONE)
      for (int c = 0; c < W; c++)
        for (int64_t g = 0; g < count; g++)
          zero[c * LANE_GROUPS + g] = load_zero(m, std::min(n0 + c, m.n - 1), first + g);
  }

 private:
  void fill_scales(int64_t n0, int64_t count) {
    int64_t row = m.block_n == 1 ? n0 : n0 / m.block_n, within = n0 - row * m.block_n;
    auto all = [&](auto fill_row) __attribute__((always_inline)) {
      for (int c = 0; c < W; c++) {
        fill_row(row * m.scale_stride_n + first * m.scale_stride_k, scale + c * LANE_GROUPS);
        if (n0 + c + 1 < m.n && ++within == m.block_n) within = 0, row++;
      }
    };
    if (m.scale_type == WL_S_NONE || m.scale_stride_k != 1)
      return all([&](int64_t at, float *to) { load_scales_apart(m, at, m.scale_stride_k, count, to); });
    with_scales(m, [&]<int TYPE>() __attribute__((always_inline)) {
      all([&](int64_t at, float *to) __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + W <= count; i += W) v_store(to + i, load_scales_as<TYPE>(m.scales, at + i));
        if (i < count) v_store(to + i, load_scales_as<TYPE>(m.scales, at + i, count - i));
      });
    });
  }

  /// Zero points packed along n.
  void fill_zeros(int64_t n0, int64_t count) {
    const int bits = m.code == WL_INT8 ? 8 : 4, per = 32 / bits;
    const VI mask = i_set((1 << bits) - 1);
    for (int c = 0; c < W; c += per) {
      const int32_t *words = static_cast<const int32_t *>(m.zeros) + std::min(n0 + c, m.n - 1) / per * m.zero_stride + first;
      for (int64_t i = 0; i < count; i += W) {
        const VI some = load_some<W * 4>(words + i, int(std::min<int64_t>(W, count - i)) * 4);
        for (int j = 0; j < per; j++) v_store(zero + (c + j) * LANE_GROUPS + i, to_float(i_and(i_shr_by(some, bits * j), mask)));
      }
    }
  }
};

}  // namespace WL_NS
