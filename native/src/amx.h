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

inline void soft_zero(int t) { std::memset(soft_tiles.data[t], 0, sizeof soft_tiles.data[t]); }
inline void soft_load(int t, const float *p, int64_t stride) {
  for (int r = 0; r < soft_tiles.config.rows[t]; r++)
    std::memcpy(soft_tiles.data[t][r], reinterpret_cast<const char *>(p) + r * stride, soft_tiles.config.bytes[t]);
}
inline void soft_store(int t, float *p, int64_t stride) {
  for (int r = 0; r < soft_tiles.config.rows[t]; r++)
    std::memcpy(reinterpret_cast<char *>(p) + r * stride, soft_tiles.data[t][r], soft_tiles.config.bytes[t]);
}
inline void soft_multiply(int c, int a, int b) {
  for (int m = 0; m < soft_tiles.config.rows[a]; m++)
    for (int n = 0; n < 16; n++)
      for (int k = 0; k < soft_tiles.config.rows[b]; k++) {
        uint16_t x[2], y[2];
        std::memcpy(x, &soft_tiles.data[a][m][k], 4);
        std::memcpy(y, &soft_tiles.data[b][k][n], 4);
        soft_tiles.data[c][m][n] += scalar_bf16(x[0]) * scalar_bf16(y[0]) + scalar_bf16(x[1]) * scalar_bf16(y[1]);
      }
}

// Macros, since a tile's number must be a literal for the intrinsics.
#define WL_TILE_CONFIG(c) soft_tiles.config = c
#define WL_TILE_RELEASE()
#define WL_TILE_ZERO(t) soft_zero(t)
#define WL_TILE_LOAD(t, p, stride) soft_load(t, p, stride)
#define WL_TILE_STORE(t, p, stride) soft_store(t, p, stride)
#define WL_TILE_MULTIPLY(c, a, b) soft_multiply(c, a, b)

#else

#define WL_TILE_CONFIG(c) _tile_loadconfig(&c)
#define WL_TILE_RELEASE() _tile_release()
#define WL_TILE_ZERO(t) _tile_zero(t)
#define WL_TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define WL_TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define WL_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

struct Tiles {
  static constexpr int UNIT = 2;
  static constexpr bool LANES = false;
  static Chains chains(const wl_matrix &) { return {0}; }  // sums are those of the tile registers
  static int places(int count, Chains) { return (count + UNIT * W - 1) / (UNIT * W) * W; }  // whole tiles

  /// Chunks of 32 columns, as [chunk][row][unit], zeros behind the last column.
  static void pack(const float *const *rows, int mr, Part part, float *dst, Chains) {
    dst += part.first / UNIT * mr;
    for (int64_t k = 0; k < part.count; k += UNIT * W, dst += W * mr)
      for (int i = 0; i < mr; i++) _mm512_storeu_si512(dst + i * W, Pairs::load_pairs(rows[i] + k, part.count - k));
  }

  static void unpack(const wl_matrix &m, int64_t n0, int64_t k0, int count, float *panel, float *scratch,
                     Chains chains) {
    Pairs::unpack(m, n0, k0, count, panel, scratch, chains);
    const int units = (count + 1) / 2, end = places(count, chains);
    if (units < end) std::memset(panel + units * NR, 0, size_t(end - units) * NR * 4);
  }

  template <int M>
  static void tile(const float *rows, const float *panel, int count, float *c, bool fresh, const Ahead &ahead, Chains chains, bool) {
    const int units = places(count, chains);
    TileConfig config;
    for (int t = 0; t < 5; t++) {  // 0, 1: sums; 2: rows; 3, 4: columns
      config.bytes[t] = 64;
      config.rows[t] = uint8_t(t < 3 ? M : W);
    }
    WL_TILE_CONFIG(config);
    WL_TILE_ZERO(0);
    WL_TILE_ZERO(1);
    constexpr int STEPS = W * UNIT / KSTEP;  // of fetching, in a chunk
    for (int u = 0; u < units; u += W) {
      for (int s = 0; s < STEPS; s++) ahead.fetch(u / W * STEPS + s);
      WL_TILE_LOAD(2, rows + int64_t(u) * M, W * 4);
      WL_TILE_LOAD(3, panel + int64_t(u) * NR, NR * 4);
      WL_TILE_LOAD(4, panel + int64_t(u) * NR + W, NR * 4);
      WL_TILE_MULTIPLY(0, 2, 3);
      WL_TILE_MULTIPLY(1, 2, 4);
    }
    alignas(64) float sums[M][NR];
    WL_TILE_STORE(0, &sums[0][0], NR * 4);
    WL_TILE_STORE(1, &sums[0][W], NR * 4);
    WL_TILE_RELEASE();
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) {
        float *p = c + m * NR + v * W;
        const V sum = v_load(sums[m] + v * W);
        v_store(p, fresh ? sum : v_add(v_load(p), sum));
      }
  }
};

}  // namespace WL_NS
