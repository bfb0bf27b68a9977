// bf16 rows times bf16 columns on tile registers (Intel AMX): 16 rows, 32 columns of n and 32 of k at
// a time. Compiled everywhere; where no processor has them, tests run it on tiles in software.
#pragma once

#include "pairs.h"

namespace WL_NS {

/// What _tile_loadconfig reads: rows and bytes of a row of each tile register.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(WL_AMX_EMULATED)

struct SoftTiles {
  TileConfig config;
  float data[8][16][16];
};
inline thread_local SoftTiles soft_tiles;

inline void tile_config(const TileConfig &c) { soft_tiles.config = c; }
inline void tile_release() {}
template <int T> inline void tile_zero() { std::memset(soft_tiles.data[T], 0, sizeof soft_tiles.data[T]); }
template <int T> inline void tile_load(const float *p, int64_t stride) {
  for (int r = 0; r < soft_tiles.config.rows[T]; r++)
    std::memcpy(soft_tiles.data[T][r], reinterpret_cast<const char *>(p) + r * stride, soft_tiles.config.bytes[T]);
}
template <int T> inline void tile_store(float *p, int64_t stride) {
  for (int r = 0; r < soft_tiles.config.rows[T]; r++)
    std::memcpy(reinterpret_cast<char *>(p) + r * stride, soft_tiles.data[T][r], soft_tiles.config.bytes[T]);
}
template <int C, int A, int B> inline void tile_multiply() {
  for (int m = 0; m < soft_tiles.config.rows[A]; m++)
    for (int n = 0; n < 16; n++)
      for (int k = 0; k < soft_tiles.config.rows[B]; k++) {
        uint16_t a[2], b[2];
        std::memcpy(a, &soft_tiles.data[A][m][k], 4);
        std::memcpy(b, &soft_tiles.data[B][k][n], 4);
        soft_tiles.data[C][m][n] += scalar_bf16(a[0]) * scalar_bf16(b[0]) + scalar_bf16(a[1]) * scalar_bf16(b[1]);
      }
}

#else

inline void tile_config(const TileConfig &c) { _tile_loadconfig(&c); }
inline void tile_release() { _tile_release(); }
template <int T> inline void tile_zero() { _tile_zero(T); }
template <int T> inline void tile_load(const float *p, int64_t stride) { _tile_loadd(T, p, stride); }
template <int T> inline void tile_store(float *p, int64_t stride) { _tile_stored(T, p, stride); }
template <int C, int A, int B> inline void tile_multiply() { _tile_dpbf16ps(C, A, B); }

#endif

struct Tiles {
  static constexpr int UNIT = 2, ROUND = W;  // a tile's row of a chunk is W units

  /// Chunks of 32 columns, as [chunk][row][unit], zeros behind the last column.
  static void pack(const float *const *rows, int mr, int64_t count, float *dst) {
    for (int64_t k = 0; k < count; k += 2 * W, dst += W * mr)
      for (int i = 0; i < mr; i++) {
        float lanes[2 * W] = {};
        const float *from = rows[i] + k;
        if (k + 2 * W > count) {
          std::memcpy(lanes, from, size_t(count - k) * 4);
          from = lanes;
        }
        _mm512_storeu_si512(dst + i * W, (VI)_mm512_cvtne2ps_pbh(v_load(from + W), v_load(from)));
      }
  }

  static void unpack(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch) {
    Pairs::unpack(m, n0, k0, count, panel, scratch);
    const int units = (count + 1) / 2, end = (units + W - 1) / W * W;
    if (units < end) std::memset(panel + units * NR, 0, size_t(end - units) * NR * 4);
  }

  template <int M>
  static void tile(const float *rows, const float *panel, int units, float *c, bool fresh, const Ahead &ahead) {
    TileConfig config;
    for (int t = 0; t < 5; t++) {  // 0, 1: sums; 2: rows; 3, 4: columns
      config.bytes[t] = 64;
      config.rows[t] = uint8_t(t < 3 ? M : W);
    }
    tile_config(config);
    tile_zero<0>();
    tile_zero<1>();
    constexpr int STEPS = W * UNIT / KSTEP;  // of fetching, in a chunk
    for (int u = 0; u < units; u += W) {
      for (int s = 0; s < STEPS; s++) ahead.fetch(u / W * STEPS + s);
      tile_load<2>(rows + int64_t(u) * M, W * 4);
      tile_load<3>(panel + int64_t(u) * NR, NR * 4);
      tile_load<4>(panel + int64_t(u) * NR + W, NR * 4);
      tile_multiply<0, 2, 3>();
      tile_multiply<1, 2, 4>();
    }
    alignas(64) float sums[M][NR];
    tile_store<0>(&sums[0][0], NR * 4);
    tile_store<1>(&sums[0][W], NR * 4);
    tile_release();
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) {
        float *p = c + m * NR + v * W;
        const V sum = v_load(sums[m] + v * W);
        v_store(p, fresh ? sum : v_add(v_load(p), sum));
      }
  }
};

}  // namespace WL_NS
