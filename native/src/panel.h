// One panel of any matrix: chooses the way its codes are read.
#pragma once

#include <algorithm>
#include <bit>

#include "unpack.h"

namespace WL_NS {

inline int item_bytes(int code) {
  return code == WL_F32 ? 4 : code == WL_BF16 || code == WL_F16 ? 2 : 1;
}

inline bool has_contiguous_rows(const wl_matrix &m) {
  return m.packing == WL_ROWS && (m.code == WL_E2M1 || m.code == WL_INT4 || m.stride_k == item_bytes(m.code));
}

/// Stored row n; the last one is repeated.
inline const uint8_t *stored_row(const wl_matrix &m, int64_t n) {
  return static_cast<const uint8_t *>(m.codes) + std::min(n, m.n - 1) * m.stride_n;
}

/// The order of a row's sums within a block of k: W chains, each in ascending order of k, are added up as
/// a tree (add_lanes). Where rows are read as words of `per` codes, chain j has what lies in lane j of
/// vectors of W words, so that few rows need no transposition (lanes.h); else (`per` 0) chain j is the
/// j-th piece of the block. Packed rows and panels hold a block chain by chain.
struct Chains {
  int per;  // a power of two, or 0
  bool operator==(const Chains &) const = default;
  static Chains of(const wl_matrix &m) { return {has_contiguous_rows(m) ? codes_per_word(m.code) : 0}; }
  int shift() const { return std::countr_zero(unsigned(per)); }
  /// Places of a chain in a block of `count` columns.
  int length(int count) const { return per ? (count + W * per - 1) / W >> shift() << shift() : KC / W; }
  /// Place of column k of a block whose chains have `length` places.
  int place(int k, int length) const {
    return per ? (k >> shift()) % W * length + (k / W >> shift() << shift()) + (k & (per - 1)) : k;
  }
  /// Places that a block takes.
  int places(int count) const { return per ? W * length(count) : count; }
  /// Columns of chain j.
  int columns(int j, int count) const {
    if (!per) return std::min(KC / W, count - j * (KC / W));
    const int whole = count / W >> shift() << shift();
    return whole + std::clamp(count - whole * W - j * per, 0, per);
  }
  Steps steps(const wl_matrix &m, int count) const {
    const int codes = codes_per_word(m.code);
    return per ? Steps{length(count), per} : Steps{codes, W * codes};
  }
};

/// W codes of one k, any strides; also the value where the code needs no scale.
inline V load_strided(const wl_matrix &m, const int64_t columns[W], int64_t k, bool full) {
  const uint8_t *base = static_cast<const uint8_t *>(m.codes) + k * m.stride_k;
  const uint8_t *first = base + columns[0] * m.stride_n;
  const int item = item_bytes(m.code);
  if (full && m.stride_n == item) {
    switch (m.code) {
      case WL_F32: return v_load(reinterpret_cast<const float *>(first));
      case WL_BF16: return load_bf16(first);
      case WL_F16: return load_f16(first);
      case WL_E4M3: return decode_e4m3(load_bytes(first));
      case WL_INT8: return to_float(load_bytes(first));
    }
  }
  // every second element: read with its neighbours, except at the very end of the matrix
  if (full && m.code == WL_BF16 && m.stride_n == 4 && k + 1 < m.k)
    return as_float(i_shl<16>(i_load(first)));
  int32_t bits[W];
  for (int i = 0; i < W; i++) {
    const uint8_t *p = base + columns[i] * m.stride_n;
    uint32_t x = 0;
    std::memcpy(&x, p, size_t(item));
    bits[i] = int32_t(m.code == WL_BF16 ? x << 16 : x);
  }
  VI r = i_load(bits);
  return m.code == WL_F16 ? half_to_float(r) : m.code == WL_E4M3 ? decode_e4m3(r)
       : m.code == WL_INT8 ? to_float(r) : as_float(r);
}

inline void unpack_strided(const wl_matrix &m, const int64_t columns[W], bool full, int64_t k0, int count,
                           float *dst, const Groups *groups) {
  if (!groups) {
    for (int i = 0; i < count; i++) v_store(dst + int64_t(i) * NR, load_strided(m, columns, k0 + i, full));
    return;
  }
  GroupAt group{m, *groups};
  for (int i = 0; i < count; i++) {
    group.move(k0 + i);
    v_store(dst + int64_t(i) * NR, group.weight(load_strided(m, columns, k0 + i, full)));
  }
}

template <int CODE>
inline void unpack_gptq(const wl_matrix &m, const int64_t columns[W], bool full, int64_t k0, int count,
                        float *dst, const Groups *groups) {
  constexpr int PER = codes_per_word(CODE);
  const int32_t *codes = static_cast<const int32_t *>(m.codes);
  GroupAt group{m, *groups};
  for (int i = 0; i < count; i += PER) {  // blocks begin with a word
    const int32_t *row = codes + (k0 + i) / PER * (m.stride_k / 4);
    int32_t lanes[W];
    for (int j = 0; !full && j < W; j++) lanes[j] = row[columns[j]];
    const Words<CODE, true> words(full ? i_load(row + columns[0]) : i_load(lanes));
    each<PER>([&](auto j) __attribute__((always_inline)) {
      if (i + j() >= count) return;
      group.move(k0 + i + j());
      v_store(dst + int64_t(i + j()) * NR, weight_of<CODE, true, j()>(words, group.scale, group.zero));
    });
  }
}

inline void unpack_awq(const wl_matrix &m, const int64_t columns[W], bool full, int64_t k0, int count, float *dst,
                       const Groups *groups) {
  int32_t shifts[W];
  for (int i = 0; i < W; i++) shifts[i] = 4 * AWQ_ORDER[columns[i] % 8];
  const VI shift = i_load(shifts), mask = i_set(15);
  const int32_t *words = static_cast<const int32_t *>(m.codes);
  GroupAt group{m, *groups};
  for (int i = 0; i < count; i++) {
    const int32_t *row = words + (k0 + i) * (m.stride_k / 4);
    int32_t lanes[W];
    for (int j = 0; !full && j < W; j++) lanes[j] = row[columns[j] / 8];
    const VI codes = full ? spread(row + columns[0] / 8) : i_load(lanes);
    group.move(k0 + i);
    v_store(dst + int64_t(i) * NR, group.weight(to_float(i_and(i_shrv(codes, shift), mask))));
  }
}

inline int64_t num_groups(const wl_matrix &m) { return (m.k + m.block_k - 1) / m.block_k; }

/// Most groups that a block of k has.
inline int64_t block_groups(const wl_matrix &m) {
  const int64_t all = num_groups(m), block = (KC + m.block_k - 1) / m.block_k + 1;
  return m.groups || all < block ? all : block;
}

/// Whether panels may hold its words as they are stored, of two columns of k each.
inline bool has_pairs(const wl_matrix &m) { return m.code == WL_BF16 && has_contiguous_rows(m); }

/// Such columns, word by word: word i of each W goes to row i * word of dst, those after it `next` rows on.
[[gnu::noinline]] inline void unpack_pairs_of(const uint8_t *const rows[W], int64_t k0, int count, float *dst, Steps steps) {
  int k = 0;
  auto whole = [&](Steps known) __attribute__((always_inline)) {
    for (; k + 2 * W <= count; k += 2 * W, dst += known.next * NR) {
      VI r[W];
      for (int i = 0; i < W; i++) r[i] = i_load(rows[i] + (k0 + k) * 2);
      transpose(r);
      for (int i = 0; i < W; i++) v_store(dst + i * known.word * NR, as_float(r[i]));
    }
  };
  if (steps.word == 1) whole({1, W});
  else if (count == KC) whole({KC / W / 2, 1});
  else whole(steps);
  if (k == count) return;
  VI r[W];
  for (int i = 0; i < W; i++) r[i] = load_some<W * 4>(rows[i] + (k0 + k) * 2, 2 * (count - k));
  transpose(r);
  for (int i = 0; i < W; i++) v_store(dst + i * steps.word * NR, as_float(r[i]));
}

inline void unpack_pairs(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, Steps steps) {
  for (int v = 0; v < NV; v++) {
    const uint8_t *rows[W];
    for (int i = 0; i < W; i++) rows[i] = stored_row(m, n0 + v * W + i);
    unpack_pairs_of(rows, k0, count, panel + v * W, steps);
  }
}

/// Floats of scratch for the scales of a panel.
inline int64_t group_floats(const wl_matrix &m) { return m.scale_type == WL_S_NONE ? 0 : 2 * NR * block_groups(m); }

/// The columns of a panel, and the scales of one block of k.
struct Source {
  int64_t columns[NR];
  const uint8_t *rows[NR];
  Groups groups[NV];
  Source(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *scratch) {
    for (int i = 0; i < NR; i++) {
      columns[i] = n0 + i < m.n ? n0 + i : m.n - 1;
      rows[i] = stored_row(m, columns[i]);
    }
    if (m.scale_type == WL_S_NONE) return;
    const int64_t low = m.groups ? 0 : k0 / m.block_k;
    const int64_t high = m.groups ? num_groups(m) - 1 : (k0 + count - 1) / m.block_k;
    for (int v = 0; v < NV; v++) {
      groups[v].scale = scratch + 2 * v * (high - low + 1) * W;
      groups[v].zero = groups[v].scale + (high - low + 1) * W;
      groups[v].fill(m, columns + v * W, n0 + (v + 1) * W <= m.n, low, high);
    }
  }
};

/// Columns n0 to n0 + NR, k0 to k0 + count (at most KC, one block): panel[place][NR], in the order of
/// `chains`.
inline void unpack_panel(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch,
                         Chains chains) {
  const Source source(m, n0, k0, count, scratch);
  const Steps steps = chains.steps(m, count);
  if (has_scales(m.code) && k0 == 0) Groups::fetch(m, n0 + NR, NR);
  for (int v = 0; v < NV; v++) {
    if (has_contiguous_rows(m)) {
      unpack_rows_of(source.rows + v * W, k0, count, panel + v * W, steps, m, source.groups[v]);
      continue;
    }
    const int64_t *columns = source.columns + v * W;
    const Groups *groups = source.groups + v;
    const bool full = n0 + (v + 1) * W <= m.n;
    if (m.packing == WL_AWQ) {
      unpack_awq(m, columns, full, k0, count, panel + v * W, groups);
    } else if (m.packing != WL_ROWS) {
      const auto unpack = m.packing == WL_GPTQ8 ? unpack_gptq<WL_INT8> : unpack_gptq<WL_INT4>;
      unpack(m, columns, full, k0, count, panel + v * W, groups);
    } else {
      unpack_strided(m, columns, full, k0, count, panel + v * W, m.scale_type == WL_S_NONE ? nullptr : groups);
    }
  }
}

}  // namespace WL_NS
