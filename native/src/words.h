// Few rows times a matrix whose words lie side by side along n (GPTQ, AWQ), with lanes along n: words are
// read as they lie. The same bits as panels give: pieces of a block of k are chains, added up as a tree.
#pragma once

#include "lanes.h"

namespace WL_NS {

constexpr int WORD_VECTORS = 8;               // of the columns of W words of AWQ, which has eight in one
/// Vectors of columns at once: two lines of each row of words of AWQ (one: 23 instead of 28 GB/s), else eight.
constexpr int tile_vectors(int packing) { return packing == WL_AWQ ? 2 * WORD_VECTORS : WORD_VECTORS; }
inline int tile_panels(const wl_matrix &m) { return tile_vectors(m.packing) / NV; }
constexpr int WORD_ROWS = W == 16 ? 8 : FEW_ROWS;  // as lane_rows
constexpr int64_t WORDS_AHEAD = 6144;         // bytes of a tile between what is read and what is fetched

/// Element 8 * j + i of `natural`, of the columns of W words, to lane j of the vector of nibble AWQ_ORDER[i].
[[gnu::always_inline]] inline void to_nibbles(V natural[WORD_VECTORS]) {
  VI r[W];
  for (int j = 0; j < W; j++) {
#if defined(__AVX512F__)
    const VI two = as_int(natural[j / 2]);
    r[j] = j % 2 ? _mm512_shuffle_i64x2(two, two, 0x4e) : two;
#else
    r[j] = as_int(natural[j]);
#endif
  }
  transpose(r);
  for (int i = 0; i < WORD_VECTORS; i++) natural[AWQ_ORDER[i]] = as_float(r[i]);
}

/// And back.
inline void from_nibbles(const float *nibbles, float *natural) {
  VI r[W];
  for (int i = 0; i < W; i++) r[i] = i < 8 ? i_load(nibbles + AWQ_ORDER[i % 8] * W) : i_set(0);
  transpose(r);
  for (int j = 0; j < W; j++) std::memcpy(natural + 8 * j, &r[j], 32);
}

template <int PACKING, int M>
struct WordTile {
  static constexpr bool BESIDE = PACKING == WL_AWQ;  // the codes of a word belong to one k
  static constexpr int BITS = PACKING == WL_GPTQ8 ? 8 : 4, PER = 32 / BITS, TALL = BESIDE ? 1 : PER;
  static constexpr int TILE_VECTORS = tile_vectors(PACKING), TILE = TILE_VECTORS * W;
  static constexpr int PASS = M <= 2 ? W / 2 : BESIDE && W == 16 && M <= 4 ? 4 : 2;  // vectors whose sums are in registers
  /// Scales of a piece stay in registers: two loads for each code take as long as its arithmetic. With eight
  /// vectors of codes as well there are too few (29 to 26 GB/s).
  static constexpr bool HELD = BESIDE;
  static constexpr int PLACES = BESIDE ? 1 : 16 / BITS;            // each with its own power of two in its zeros
  static constexpr int GROUP = (1 + PLACES) * TILE;                // floats of a group: scales, zeros
  static constexpr int PIECE = KC / W, LEVELS = std::countr_zero(unsigned(W));
  static constexpr int ROW_BYTES = TILE * 4 / (BESIDE ? 8 : 1), LINES = PASS * W * 4 / 64;

  const wl_matrix &m;
  const int64_t n0, ldx;
  const float *x;
  float *tables;
  const int64_t row_bytes = BESIDE ? (m.n - n0 + 7) / 8 * 4 : (m.n - n0) * 4;  // from the tile's first column on
  int64_t low = 0, high = -1;  // groups that tables have
  const float *group_of[KC];   // of each k of a block
  alignas(64) float waiting[LEVELS][M * TILE], total[M * TILE];

  WordTile(const wl_matrix &m, int64_t n0, int64_t ldx, const float *x, float *tables) : m(m), n0(n0), ldx(ldx), x(x), tables(tables) {}

  void fill_group(int64_t g, float *to) {
    for (int first = 0; first < TILE_VECTORS && n0 + first * W < m.n; first += WORD_VECTORS) {
      V scale[WORD_VECTORS], zero[WORD_VECTORS];
      for (int v = 0; v < WORD_VECTORS; v++) Groups::one(m, n0 + (first + v) * W, g, scale[v], zero[v]);
      if (BESIDE) to_nibbles(scale), to_nibbles(zero);
      for (int v = 0; v < WORD_VECTORS; v++) {
        v_store(to + (first + v) * W, scale[v]);
        for (int p = 0; p < PLACES; p++)
          v_store(to + (1 + p) * TILE + (first + v) * W, v_add(zero[v], v_set(power_of<BITS>(BESIDE ? v % PASS : p))));
      }
    }
  }

  /// Fetches what `fill_group` will read of the block of k0, of columns n0 and following.
  static void fetch_groups(const wl_matrix &m, int64_t n0, int64_t k0) {
    if (m.groups || m.block_n != 1 || m.scale_stride_n != 1 || n0 + TILE > m.n) return;
    const int size = scale_bytes(m.scale_type);
    for (int64_t g = k0 / m.block_k; g <= (std::min(k0 + KC, m.k) - 1) / m.block_k; g++) {
      fetch_lines(static_cast<const uint8_t *>(m.scales) + (n0 + g * m.scale_stride_k) * size, TILE * size);
      if (m.zeros) fetch_lines(static_cast<const uint8_t *>(m.zeros) + (g * m.zero_stride + n0 * BITS / 32) * 4, TILE * BITS / 8);
    }
  }

  void fill(int64_t k0, int count) {
    const int64_t first = m.groups ? 0 : k0 / m.block_k, last = m.groups ? num_groups(m) - 1 : (k0 + count - 1) / m.block_k;
    if (first != low || last != high)
      for (int64_t g = first; g <= last; g++) fill_group(g, tables + (g - first) * GROUP);
    low = first, high = last;
    for (int k = 0; m.groups && k < count; k++) group_of[k] = tables + m.groups[k0 + k] * GROUP;
    int k = 0;
    for (int64_t g = first; !m.groups && g <= last; g++)  // a division for each k would take longer than products
      for (const int64_t end = std::min<int64_t>(count, (g + 1) * m.block_k - k0); k < end; k++) group_of[k] = tables + (g - first) * GROUP;
  }

  [[gnu::always_inline]] static void load_scales_of(const float *group, V scale[PASS]) {
    each<PASS>([&](auto c) __attribute__((always_inline)) { scale[c()] = v_load(group + c() * W); });
  }

  /// One k, whose x is at `at`, of PASS vectors: code I of halves of words, or codes of one word.
  template <int I>
  [[gnu::always_inline]] void add(const VI half[PASS], const V scale[PASS], const float *group, const float *at, V sum[PASS][M]) {
    V y[M];
    for (int j = 0; j < M; j++) y[j] = v_set(at[j * ldx]);
    each<PASS>([&](auto c) __attribute__((always_inline)) {
      constexpr int CODE = BESIDE ? c() : I, PLACE = BESIDE ? 0 : I % PLACES;
      const V code = raised_code<BITS, CODE>(half[BESIDE ? c() / 4 : c()]);
      const V w = v_mul(v_sub(code, v_load(group + (1 + PLACE) * TILE + c() * W)), scale[c()]);
      for (int j = 0; j < M; j++) sum[c()][j] = v_fma(y[j], w, sum[c()][j]);
    });
  }

  /// A piece of a block: `count` columns of k, in rows of words.
  struct Piece {
    const uint8_t *rows;
    int64_t stride, ahead;  // ahead: from a row to what is fetched
    int index, count;
  };

  /// Codes of one row of words, whose first k is `left` before the end of the piece.
  template <bool ONE>
  [[gnu::always_inline]] void add_row(const uint8_t *row, int64_t ahead, int left, const float *const *group, V scale[PASS], int v, const float *at,
                                      V sum[PASS][M]) {
    VI r[PASS];
    auto of = [&](int k) __attribute__((always_inline)) {
      if (!(ONE && HELD)) load_scales_of(group[ONE ? 0 : k] + v * W, scale);
      return group[ONE ? 0 : k] + v * W;
    };
    if constexpr (BESIDE) {
      row += v / WORD_VECTORS * W * 4;
      if (v % WORD_VECTORS == 0) fetch_line<_MM_HINT_T0>(row + ahead);
      for (int c = 0; c < PASS; c += 4) r[c / 4] = raise_half(i_shr_by(i_load(row), v % WORD_VECTORS * BITS), c / 4);
      const float *own = of(0);
      add<0>(r, scale, own, at, sum);
    } else {
      each<2>([&](auto half) __attribute__((always_inline)) {
        for (int c = 0; c < PASS; c++) r[c] = raise_half(i_load(row + (v + c) * W * 4), half());
        each<PER / 2>([&](auto n) __attribute__((always_inline)) {
          constexpr int CODE = half() * PER / 2 + n(), FIRST = CODE * LINES / PER, END = (CODE + 1) * LINES / PER;
          // a few at a time: a burst of them would wait for memory
          for (int line = FIRST; line < END; line++) fetch_line<_MM_HINT_T0>(row + ahead + v * W * 4 + line * 64);
          if (ONE || CODE < left) {
            const float *own = of(CODE);
            add<CODE>(r, scale, own, at + CODE, sum);
          }
        });
      });
    }
  }

  /// The chain of a piece, of PASS vectors from `v` on. ONE: it is whole, and of one group.
  template <bool ONE>
  [[gnu::always_inline]] void add_piece(const Piece &piece, bool fresh, int v, const float *at) {
    V sum[PASS][M];
    each<PASS * M>([&](auto i) __attribute__((always_inline)) { sum[i() / M][i() % M] = v_zero(); });
    const float *const *group = group_of + piece.index * PIECE;
    const int count = ONE ? PIECE : piece.count;
    V scale[PASS];
    if (ONE && HELD) load_scales_of(*group + v * W, scale);
    for (int i = 0; i < count; i += TALL)
      add_row<ONE>(piece.rows + i / TALL * piece.stride, piece.ahead, count - i, ONE ? group : group + i, scale, v, at + i, sum);
    join(piece.index, fresh, v, sum);
  }

  /// Chain `index` of a block joins those before it, as in a binary counter.
  [[gnu::always_inline]] void join(int index, bool fresh, int v, V sum[PASS][M]) {
    auto through = [&](float *at, auto f) __attribute__((always_inline)) {
      each<M>([&](auto j) __attribute__((always_inline)) {
        each<PASS>([&](auto c) __attribute__((always_inline)) { f(at + j() * TILE + (v + c()) * W, sum[c()][j()]); });
      });
    };
    auto plus = [](float *held, V &one) __attribute__((always_inline)) { one = v_add(v_load(held), one); };
    auto keep = [](float *held, V &one) __attribute__((always_inline)) { v_store(held, one); };
    int level = 0;
    for (; index >> level & 1; level++) through(waiting[level], plus);
    if (level == LEVELS && !fresh) through(total, plus);
    through(level == LEVELS ? total : waiting[level], keep);
  }

  void multiply_block(int64_t k0, int count) {
    const int64_t num = (m.k + TALL - 1) / TALL, far = std::max<int64_t>(WORDS_AHEAD / ROW_BYTES, 1);
    alignas(64) uint8_t copy[PIECE / TALL * ROW_BYTES];
    if (row_bytes < ROW_BYTES) std::memset(copy, 0, sizeof copy);
    for (int index = 0; index < W; index++) {
      const int k = index * PIECE, columns = std::clamp(count - k, 0, PIECE);
      const int64_t row = (k0 + k) / TALL;
      Piece piece{static_cast<const uint8_t *>(m.codes) + row * m.stride_k + (BESIDE ? n0 / 8 : n0) * 4, m.stride_k, far * m.stride_k, index, columns};
      if (row + far >= num) piece.ahead += ROW_BYTES - num * m.stride_k;  // the next columns
      const bool is_one = columns == PIECE && !m.groups && m.block_k % PIECE == 0;
      for (int v = 0; v < TILE_VECTORS; v += PASS) {
        if (n0 + (BESIDE ? v / WORD_VECTORS * WORD_VECTORS : v) * W >= m.n) break;
        const int64_t end = BESIDE ? (v / WORD_VECTORS + 1) * W * 4 : (v + PASS) * W * 4;
        if (end > row_bytes && piece.rows != copy) {  // only bytes that exist are read
          for (int i = 0; i * TALL < columns; i++) std::memcpy(copy + i * ROW_BYTES, piece.rows + i * piece.stride, size_t(row_bytes));
          piece.rows = copy, piece.stride = ROW_BYTES;
        }
        if (is_one) add_piece<true>(piece, k0 == 0, v, x + k0 + k);
        else add_piece<false>(piece, k0 == 0, v, x + k0 + k);
      }
    }
  }

  /// c[panel][M][NR]
  void multiply(float *c) {
    for (int64_t k0 = 0; k0 < m.k; k0 += KC) {
      const int count = int(std::min<int64_t>(KC, m.k - k0));
      fill(k0, count);
      const bool more = k0 + KC < m.k;
      fetch_groups(m, more ? n0 : n0 + TILE, more ? k0 + KC : 0);
      multiply_block(k0, count);
    }
    alignas(64) float natural[TILE + 8];
    for (int j = 0; j < M; j++) {
      for (int v = 0; BESIDE && v < TILE_VECTORS; v += WORD_VECTORS) from_nibbles(total + j * TILE + v * W, natural + v * W);
      const float *from = BESIDE ? natural : total + j * TILE;
      for (int p = 0; p < TILE / NR; p++) std::memcpy(c + (p * M + j) * NR, from + p * NR, NR * 4);
    }
  }
};

inline bool has_words_along_n(const wl_matrix &m) { return m.packing != WL_ROWS; }

/// Floats of scratch for the groups of a tile.
inline int64_t word_floats(const wl_matrix &m) { return std::max(WordTile<WL_GPTQ, 1>::GROUP, WordTile<WL_AWQ, 1>::GROUP) * block_groups(m); }

template <int PACKING>
inline void multiply_words_as(const wl_matrix &m, int64_t n0, const float *x, int64_t ldx, int64_t rows, float *tables, float *c) {
  with_rows<WORD_ROWS>(rows, [&]<int M>() { WordTile<PACKING, M>(m, n0, ldx, x, tables).multiply(c); });
}

/// Fetches what a tile begins with.
template <int PACKING>
inline void fetch_words_as(const wl_matrix &m, int64_t n0) {
  using Tile = WordTile<PACKING, 1>;
  if (n0 + Tile::TILE > m.n) return;
  const uint8_t *rows = static_cast<const uint8_t *>(m.codes) + (Tile::BESIDE ? n0 / 8 : n0) * 4;
  const int64_t num = std::min<int64_t>(WORDS_AHEAD / Tile::ROW_BYTES, m.k / Tile::TALL);
  for (int64_t i = 0; i < num; i++) fetch_lines(rows + i * m.stride_k, Tile::ROW_BYTES);
  Tile::fetch_groups(m, n0, 0);
}

inline void fetch_words(const wl_matrix &m, int64_t n0) {
  switch (m.packing) {
    case WL_GPTQ: return fetch_words_as<WL_GPTQ>(m, n0);
    case WL_GPTQ8: return fetch_words_as<WL_GPTQ8>(m, n0);
    case WL_AWQ: return fetch_words_as<WL_AWQ>(m, n0);
  }
}

/// Columns of a tile, from n0 on, of `rows` rows (at most WORD_ROWS) times a matrix: c[panel][rows][NR].
inline void multiply_words(const wl_matrix &m, int64_t n0, const float *x, int64_t ldx, int64_t rows, float *tables, float *c) {
  switch (m.packing) {
    case WL_GPTQ: return multiply_words_as<WL_GPTQ>(m, n0, x, ldx, rows, tables, c);
    case WL_GPTQ8: return multiply_words_as<WL_GPTQ8>(m, n0, x, ldx, rows, tables, c);
    case WL_AWQ: return multiply_words_as<WL_AWQ>(m, n0, x, ldx, rows, tables, c);
  }
}

}  // namespace WL_NS
