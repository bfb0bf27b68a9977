// How rows meet a matrix: by panels, or where they are few by its words as they lie.
#pragma once

#include "words.h"

namespace WL_NS {

/// How the packed rows of a product lie: as blocks for tiles, or row by row.
template <class Mode>
struct Layout {
  enum Way { PANELS, LANES, WORDS };
  Chains chains;
  Way way = PANELS;
  int num_panels = 1;
  bool operator==(const Layout &) const = default;
  Layout(const wl_matrix &m, int64_t rows) : chains(Mode::chains(m)) {
    if (!Mode::LANES) return;
    if (rows <= lane_rows(m.code) && has_contiguous_rows(m) && has_even_groups(m)) way = LANES;
    if (rows <= WORD_ROWS && has_words_along_n(m)) way = WORDS, num_panels = tile_panels(m);
  }
  /// Floats of a packed row of k columns.
  int64_t width(int64_t k) const {
    const int64_t stripe = W * std::max(chains.per, 1);
    return way != PANELS ? (k + stripe - 1) / stripe * stripe : packed_width<Mode>(k, chains);
  }
  /// Panels that are multiplied together.
  int panels() const { return num_panels; }
  int64_t scratch_floats(const wl_matrix &m) const { return way == WORDS ? word_floats(m) : group_floats(m); }
  /// Block `b` of a part of the rows.
  void pack(const float *const *rows, Blocks blocks, int64_t b, Part part, float *packed) const {
    float *dst = packed + blocks.begin(b) * width(part.total);
    const int mr = blocks.size(b);
    if constexpr (Mode::LANES) {
      for (int i = 0; way != PANELS && i < mr; i++) pack_lanes<Mode>(rows[i], part, dst + i * width(part.total), chains);
    }
    if (way == PANELS) Mode::pack(rows, mr, part, dst, chains);
  }
};

/// Fetches what is read first of columns n0 and following where there are no panels. What comes after it
/// is fetched by the loops that read it; only what is first would be waited for.
template <class Mode>
inline void fetch_start(const wl_matrix &m, int64_t n0, const Layout<Mode> &layout) {
  if (layout.way == Layout<Mode>::PANELS) return;
  if (layout.way == Layout<Mode>::WORDS) return fetch_words(m, n0);
  fetch_lines(stored_row(m, n0), std::min(LANE_AHEAD, (m.n - n0) * m.stride_n));
  if (has_scales(m.code)) Groups::fetch(m, n0, W);
}

/// Columns n0 .. n0 + `panels` * NR (a multiple of what the matrix's layout takes together) of packed rows
/// times a matrix, all of k: c[panel][rows][NR].
template <class Mode>
inline void multiply_columns(const wl_matrix &m, int64_t n0, int panels, const float *packed, int64_t rows, float *panel,
                             float *scratch, float *c) {
  const Layout<Mode> layout(m, rows);
  for (int p = 0; p < panels && n0 + p * NR < m.n; p += layout.panels()) {
    const int64_t n = n0 + p * NR;
    float *to = c + p * rows * NR;
    if constexpr (Mode::LANES) {
      if (layout.way == Layout<Mode>::WORDS) multiply_words(m, n, packed, layout.width(m.k), rows, scratch, to);
      if (layout.way == Layout<Mode>::LANES) multiply_lanes(m, n, packed, layout.width(m.k), rows, panel, to);
    }
    if constexpr (requires { Mode::multiply_few(m, n, packed, rows, panel, to); }) {
      if (Mode::multiply_few(m, n, packed, rows, panel, to)) continue;
    }
    if (layout.way == Layout<Mode>::PANELS) multiply_panels<Mode>(m, n, packed, rows, panel, scratch, to);
  }
}

}  // namespace WL_NS
