// Small row-wise operations, where a library call for each step costs more than the arithmetic.
#pragma once

#include "products.h"

namespace WL_NS {

constexpr int64_t SMALL = 1 << 15;  // elements below which waking threads does not pay

/// Calls `row` for every row of `work`, of `elements` each; all threads do where that pays.
template <auto row, class Work>
inline void for_rows(const Work &work, int64_t elements) {
  if (work.num_rows * elements <= SMALL) {
    for (int64_t i = 0; i < work.num_rows; i++) row(work, i);
    return;
  }
  struct Shares {
    const Work &work;
    int64_t step;
  } shares{work, std::max<int64_t>(1, SMALL / 4 / elements)};
  auto task = [](wl::Team &team, int, void *context) {
    const auto &[own, step] = *static_cast<Shares *>(context);
    int64_t i;
    while ((i = team.next((own.num_rows + step - 1) / step)) >= 0)
      for (int64_t at = i * step; at < std::min(own.num_rows, (i + 1) * step); at++) row(own, at);
  };
  wl::run_team(task, &shares);
}

inline V load_as(const void *p, int32_t type, int64_t i) {
  const uint8_t *bytes = static_cast<const uint8_t *>(p);
  return type == WL_F32 ? v_load(reinterpret_cast<const float *>(bytes) + i)
       : type == WL_BF16 ? load_bf16(bytes + 2 * i) : load_f16(bytes + 2 * i);
}

/// The first `count` < W elements, zeros behind them.
inline V load_tail(const void *p, int32_t type, int64_t i, int count) {
  alignas(64) uint8_t copy[W * 4] = {};
  const int item = item_bytes(type);
  std::memcpy(copy, static_cast<const uint8_t *>(p) + i * item, size_t(count * item));
  return load_as(copy, type, 0);
}

inline void store_tail(float *p, V x, int count) {
  float lanes[W];
  v_store(lanes, x);
  std::memcpy(p, lanes, size_t(count) * 4);
}

/// The first `count` floats, W or fewer.
inline V load_floats(const float *p, int count) { return count == W ? v_load(p) : load_tail(p, WL_F32, 0, count); }
inline void store_floats(float *p, V x, int count) {
  if (count == W) v_store(p, x);
  else store_tail(p, x, count);
}

struct NormWork {
  const float *x;
  int64_t ldx;
  float *y;
  int64_t ldy, num_rows, width;
  const void *weight;
  int32_t type;
  float add, eps;
};

inline void norm_row(const NormWork &n, int64_t row) {
  const float *x = n.x + row * n.ldx;
  float *y = n.y + row * n.ldy;
  const int rest = int(n.width % W);
  const int64_t even = n.width - rest;
  V sum = v_zero();
  for (int64_t i = 0; i < even; i += W) sum = v_fma(v_load(x + i), v_load(x + i), sum);
  if (rest) {
    V tail = load_tail(x, WL_F32, even, rest);
    sum = v_fma(tail, tail, sum);
  }
  const V scale = v_set(1.0f / std::sqrt(v_sum(sum) / float(n.width) + n.eps)), add = v_set(n.add);
  for (int64_t i = 0; i < even; i += W)
    v_store(y + i, v_mul(v_mul(v_load(x + i), scale), v_add(load_as(n.weight, n.type, i), add)));
  if (rest) {
    V w = v_add(load_tail(n.weight, n.type, even, rest), add);
    store_tail(y + even, v_mul(v_mul(load_tail(x, WL_F32, even, rest), scale), w), rest);
  }
}

inline void rms_norm(const NormWork &n) { for_rows<norm_row>(n, n.width); }

struct CombineWork {
  const float *outputs, *weights, *shared, *residual;
  float *out;
  int64_t num_rows, per_row, width;
  float multiplier;
};

inline void combine_row(const CombineWork &c, int64_t row) {
  const float *weights = c.weights + row * c.per_row, *outputs = c.outputs + row * c.per_row * c.width;
  for (int64_t i = 0; i < c.width; i += W) {
    const int count = int(std::min<int64_t>(W, c.width - i));
    auto get = [&](const float *p) { return load_floats(p, count); };
    V sum = c.per_row ? v_mul(v_set(weights[0]), get(outputs + i)) : v_zero();
    for (int64_t a = 1; a < c.per_row; a++) sum = v_fma(v_set(weights[a]), get(outputs + a * c.width + i), sum);
    if (c.shared) sum = v_add(sum, get(c.shared + row * c.width + i));
    const V before = c.residual ? get(c.residual + row * c.width + i) : v_zero();
    sum = v_fma(v_set(c.multiplier), sum, before);
    store_floats(c.out + row * c.width + i, sum, count);
  }
}

inline void combine(const CombineWork &c) { for_rows<combine_row>(c, c.width * std::max<int64_t>(1, c.per_row)); }

struct RotateWork {
  float *x;
  int64_t row_stride, head_stride, num_rows, num_heads, pairs;
  const float *cos, *sin;
  int64_t table_stride;
  int32_t interleaved;
};

inline void rotate_row(const RotateWork &r, int64_t row) {
  const float *cos = r.cos + row * r.table_stride, *sin = r.sin + row * r.table_stride;
  for (int64_t head = 0; head < r.num_heads; head++) {
    float *x = r.x + row * r.row_stride + head * r.head_stride;
    int64_t i = 0;
    for (; !r.interleaved && i + W <= r.pairs; i += W) {
      V a = v_load(x + i), b = v_load(x + r.pairs + i), c = v_load(cos + i), s = v_load(sin + i);
      v_store(x + i, v_sub(v_mul(a, c), v_mul(b, s)));
      v_store(x + r.pairs + i, v_add(v_mul(b, c), v_mul(a, s)));
    }
    const int64_t step = r.interleaved ? 2 : 1, other = r.interleaved ? 1 : r.pairs;
    for (; i < r.pairs; i++) {
      float &a = x[i * step], &b = x[i * step + other];
      const float turned = a * cos[i] - b * sin[i];
      b = b * cos[i] + a * sin[i];
      a = turned;
    }
  }
}

inline void rotate(const RotateWork &r) { for_rows<rotate_row>(r, r.num_heads * r.pairs); }

struct WriteWork {
  const float *x;
  int64_t row_stride, head_stride, num_rows, num_heads, width;
  wl_cache to;
  const int64_t *pages, *offsets;
  int64_t page_tokens;
};

/// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return uint16_t(is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// One head as bytes and a scale: the largest magnitude is 127 steps from the code of 0. A NaN or an infinity makes
/// the scale NaN or infinite, and so all that the codes of 0 mean.
inline void write_int8(const float *x, int64_t width, uint8_t *to, float &scale) {
  float top = 0;
  for (int64_t i = 0; i < width; i++) {
    const float size = std::fabs(x[i]);
    top = size > top || size != size ? size : top;
  }
  scale = top / 127.0f;
  const V step = v_set(scale == 0 ? 1.0f : scale), most = v_set(127.0f);
  for (int64_t i = 0; i < width; i += W) {
    const int count = int(std::min<int64_t>(W, width - i));
    const V value = v_round(v_div(load_floats(x + i, count), step));
    float lanes[W];
    v_store(lanes, v_max(v_min(value, most), v_set(-127.0f)));
    for (int j = 0; j < count; j++) to[i + j] = uint8_t(scale - scale == 0 ? int(lanes[j]) + 128 : 128);
  }
}

inline void write_row(const WriteWork &w, int64_t row) {
  uint8_t *page = static_cast<uint8_t *>(w.to.data) + w.pages[row] * w.to.page_stride + w.offsets[row] * w.to.token_stride;
  for (int64_t head = 0; head < w.num_heads; head++) {
    const float *x = w.x + row * w.row_stride + head * w.head_stride;
    uint8_t *to = page + head * w.to.head_stride;
    if (w.to.type == WL_INT8) {
      write_int8(x, w.width, to, w.to.scales[(w.pages[row] * w.num_heads + head) * w.page_tokens + w.offsets[row]]);
      continue;
    }
    if (w.to.type == WL_F32) {
      std::memcpy(to, x, size_t(w.width) * 4);
      continue;
    }
    uint16_t *halves = reinterpret_cast<uint16_t *>(to);
    if (w.to.type == WL_BF16) {
      for (int64_t i = 0; i < w.width; i++) halves[i] = to_bf16(x[i]);
    } else {
      for (int64_t i = 0; i < w.width; i++) halves[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
    }
  }
}

inline void write_rows(const WriteWork &w) { for_rows<write_row>(w, w.num_heads * w.width); }

struct CopyWork {
  const float *x;
  int64_t row_stride, head_stride, num_rows, num_heads, width;
  float *out;
  int64_t out_row_stride, out_head_stride;
};

inline void copy_row(const CopyWork &c, int64_t row) {
  for (int64_t head = 0; head < c.num_heads; head++)
    std::memcpy(c.out + row * c.out_row_stride + head * c.out_head_stride,
                c.x + row * c.row_stride + head * c.head_stride, size_t(c.width) * 4);
}

inline void copy_rows(const CopyWork &c) { for_rows<copy_row>(c, c.num_heads * c.width); }

struct GateWork {
  float *x;
  int64_t num_rows, width;
  const float *gate;
  bool one_of_row;
};

inline void gate_row(const GateWork &g, int64_t row) {
  const V all = g.one_of_row ? v_sigmoid(v_set(g.gate[row])) : v_zero();
  for (int64_t i = 0; i < g.width; i += W) {
    const int count = int(std::min<int64_t>(W, g.width - i));
    float *x = g.x + row * g.width + i;
    const V by = g.one_of_row ? all : v_sigmoid(load_floats(g.gate + row * g.width + i, count));
    store_floats(x, v_mul(load_floats(x, count), by), count);
  }
}

inline void gate(const GateWork &g) { for_rows<gate_row>(g, g.width * 4); }

struct ReadWork {
  const uint8_t *data;
  int64_t num_bytes;
  std::atomic<float> sum{0.0f};
};

inline void read_task(wl::Team &team, int thread, void *context) {
  ReadWork &r = *static_cast<ReadWork *>(context);
  constexpr int64_t STEP = 1 << 16, LINES = 4 * W * 4;
  int64_t i;
  V sums[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
  while ((i = team.next_beside(thread, (r.num_bytes + STEP - 1) / STEP)) >= 0) {
    const int64_t end = std::min(r.num_bytes, (i + 1) * STEP);
    for (int64_t at = i * STEP; at + LINES <= end; at += LINES)
      for (int v = 0; v < 4; v++) sums[v] = v_add(sums[v], v_load(reinterpret_cast<const float *>(r.data + at) + v * W));
  }
  r.sum.store(v_sum(v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3]))), std::memory_order_relaxed);
}

inline float read_all(const uint8_t *data, int64_t num_bytes) {
  ReadWork work{data, num_bytes};
  wl::run_team(read_task, &work);
  return work.sum.load(std::memory_order_relaxed);
}

}  // namespace WL_NS
