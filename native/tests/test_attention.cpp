// wl_attend against a plain softmax in double precision, and bit for bit against itself.
#include <algorithm>
#include <numeric>

#include "matrices.h"

using test::Run;

namespace {

constexpr float UNTOUCHED = -12345.0f;
constexpr int64_t MOST_TILE_ROWS = 64;

/// Keys or values of all pages, in a buffer that ends with the last row.
struct Cache {
  Cache(Run &run, int32_t type, int64_t pages, int64_t heads, int64_t tokens, int64_t width) {
    c.type = type, c.width = width;
    item = type == WL_F32 ? 4 : type == WL_INT8 ? 1 : 2;
    const int64_t pad = item * run.pick<int64_t>({0, 0, 1, 9});
    if (run.chance(0.3)) {  // (pages, tokens, heads, width)
      c.head_stride = width * item, c.token_stride = heads * c.head_stride + pad, c.page_stride = tokens * c.token_stride;
    } else {
      c.token_stride = width * item, c.head_stride = tokens * c.token_stride, c.page_stride = heads * c.head_stride + pad;
    }
    bytes.resize(size_t((pages - 1) * c.page_stride + (heads - 1) * c.head_stride + (tokens - 1) * c.token_stride + width * item));
    for (int64_t i = 0; i < int64_t(bytes.size()) / item; i++) {
      const float x = run.normal();
      const uint16_t half = test::usual_bits(run, type, -2);
      const uint8_t byte = uint8_t(run.bits());
      std::memcpy(&bytes[size_t(i * item)], item == 4 ? static_cast<const void *>(&x) : item == 2 ? static_cast<const void *>(&half) : &byte, size_t(item));
    }
    c.data = bytes.data();
    if (type == WL_INT8) {
      scales.resize(size_t(pages * heads * tokens));
      for (float &scale : scales) scale = 0.02f * (0.5f + float(run.bits() % 1000) / 1000.0f);
      c.scales = scales.data();
    }
  }
  uint8_t *at(int64_t page, int64_t head, int64_t token, int64_t i) {
    return bytes.data() + page * c.page_stride + head * c.head_stride + token * c.token_stride + i * item;
  }
  wl_cache c{};
  int64_t item;
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
};

float read(const wl_cache &c, int64_t page, int64_t head, int64_t token, int64_t i, int64_t heads, int64_t tokens) {
  const uint8_t *row = static_cast<const uint8_t *>(c.data) + page * c.page_stride + head * c.head_stride + token * c.token_stride;
  float x;
  uint16_t half;
  switch (c.type) {
    case WL_F32: std::memcpy(&x, row + 4 * i, 4); return x;
    case WL_BF16: case WL_F16: std::memcpy(&half, row + 2 * i, 2); return test::from_bits(c.type, half);
    default: return (float(row[i]) - 128.0f) * c.scales[(page * heads + head) * tokens + token];
  }
}

struct Sequence {
  int64_t row, num_rows, position;
  std::vector<int64_t> pages;
};

struct Case {
  struct Shape {
    int64_t heads, kv_heads, d, v;
    bool is_latent;  // values are the first v columns of the keys
  };

  Case(Run &run, const Shape &shape, int32_t type, int64_t num, int64_t most_before, int64_t most_rows)
      : kv_heads(shape.kv_heads), tokens(run.pick<int64_t>({1, 4, 32, 33})),
        lists(plan(run, num, most_before, most_rows)),
        keys(run, type, num_pages, kv_heads, tokens, std::max(shape.d, shape.is_latent ? shape.v : 1) + run.pick<int64_t>({0, 0, 3, 8})),
        values(run, type, num_pages, kv_heads, tokens, shape.v + run.pick<int64_t>({0, 0, 3, 8})) {
    q = run.normals(num_rows * shape.heads * shape.d);
    work.num_heads = shape.heads, work.num_kv_heads = kv_heads, work.key_dim = shape.d, work.value_dim = shape.v;
    work.scale = 1.0f / std::sqrt(float(shape.d));
    work.window = run.pick<int64_t>({0, 0, 1, 6, 64, 100});
    if (run.chance(0.4)) sinks = run.normals(shape.heads), work.sinks = sinks.data();
    work.page_tokens = tokens;
    work.keys = keys.c;
    work.values = shape.is_latent ? keys.c : values.c;
  }

  std::vector<Sequence> plan(Run &run, int64_t num, int64_t most_before, int64_t most_rows) {
    std::vector<Sequence> all;
    for (int64_t i = 0; i < num; i++) {
      Sequence s{num_rows, run.chance(0.5) ? 1 : run.size(most_rows), run.between(0, most_before), {}};
      num_rows += s.num_rows;
      s.pages.resize(size_t((s.position + s.num_rows - 1) / tokens + 1));
      num_pages += int64_t(s.pages.size());
      all.push_back(s);
    }
    num_pages += 1;  // one that no sequence has
    std::vector<int64_t> order(static_cast<size_t>(num_pages));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[size_t(run.between(0, int64_t(i) - 1))]);
    for (Sequence &s : all)
      for (int64_t &page : s.pages) page = order.back(), order.pop_back();
    return all;
  }

  /// Tiles of `most` rows, or of random numbers up to that.
  std::vector<wl_tile> tiles(Run &run, int64_t most, bool is_random) const {
    std::vector<wl_tile> all;
    for (const Sequence &s : lists)
      for (int64_t first = 0, rows; first < s.num_rows; first += rows) {
        rows = std::min(s.num_rows - first, is_random ? run.between(1, most) : most);
        all.push_back({s.row + first, rows, s.position + first, s.pages.data()});
      }
    if (is_random) std::reverse(all.begin(), all.end());
    return all;
  }
  std::vector<float> call(const std::vector<wl_tile> &tiles) {
    std::vector<float> out(size_t(num_rows * work.num_heads * work.value_dim), UNTOUCHED);
    work.q = q.data(), work.out = out.data(), work.tiles = tiles.data(), work.num_tiles = int64_t(tiles.size());
    CHECK(wl_attend(&work) == WL_OK, "refused");
    return out;
  }

  void expect_right(const std::vector<float> &out, const Sequence &s, int64_t row, int64_t head) const {
    const int64_t kv = head / (work.num_heads / kv_heads), position = s.position + row, d = work.key_dim;
    const int64_t oldest = work.window ? std::max<int64_t>(0, position - work.window + 1) : 0;
    const float *query = &q[size_t(((s.row + row) * work.num_heads + head) * d)];
    std::vector<double> scores, result(size_t(work.value_dim), 0.0), size(result);
    double top = work.sinks ? double(work.sinks[head]) : -1e300, largest = 0;
    for (int64_t t = oldest; t <= position; t++) {
      double sum = 0, part = 0;
      for (int64_t i = 0; i < d; i++) {
        const double term = double(query[i]) * double(work.scale) * double(read(work.keys, s.pages[size_t(t / tokens)], kv, t % tokens, i, kv_heads, tokens));
        sum += term, part += std::fabs(term);
      }
      scores.push_back(sum);
      top = std::max(top, sum);
      largest = std::max(largest, part);
    }
    double total = work.sinks ? std::exp(double(work.sinks[head]) - top) : 0;
    for (size_t i = 0; i < scores.size(); i++) {
      const double weight = std::exp(scores[i] - top);
      const int64_t t = oldest + int64_t(i);
      total += weight;
      for (int64_t j = 0; j < work.value_dim; j++) {
        const double x = weight * double(read(work.values, s.pages[size_t(t / tokens)], kv, t % tokens, j, kv_heads, tokens));
        result[size_t(j)] += x, size[size_t(j)] += std::fabs(x);
      }
    }
    // a score is off by d roundings; its exponential by as much, relative to itself
    const double relative = 2e-6 + 2 * double(d + 4) * std::ldexp(largest, -24) + double(scores.size()) * std::ldexp(1.0, -23);
    for (int64_t j = 0; j < work.value_dim; j++) {
      const double got = double(out[size_t(((s.row + row) * work.num_heads + head) * work.value_dim + j)]), expected = result[size_t(j)] / total;
      CHECK(test::near(got, expected, relative * size[size_t(j)] / total + 1e-30), "type %d heads %ld/%ld d %ld v %ld window %ld page %ld position %ld head %ld column %ld: %g, expected %g",
            work.keys.type, long(work.num_heads), long(kv_heads), long(d), long(work.value_dim), long(work.window), long(tokens), long(position), long(head), long(j), got, expected);
    }
  }
  void expect_same(const std::vector<float> &a, const std::vector<float> &b, const char *what) const {
    const int64_t at = test::first_difference(a.data(), b.data(), int64_t(a.size())), per_row = work.num_heads * work.value_dim;
    CHECK(at < 0, "%s: heads %ld/%ld d %ld v %ld window %ld row %ld of %ld", what, long(work.num_heads), long(kv_heads), long(work.key_dim), long(work.value_dim),
          long(work.window), long(at / per_row), long(num_rows));
  }

  int64_t kv_heads, tokens, num_rows = 0, num_pages = 0;
  std::vector<Sequence> lists;
  Cache keys, values;
  std::vector<float> q, sinks;
  wl_attention work{};
};

Case::Shape any_shape(Run &run) {
  return run.pick<Case::Shape>({
      {4, 2, 64, 64, false}, {3, 3, 5, 7, false}, {8, 1, 12, 4, false}, {16, 2, 128, 128, false}, {6, 2, 33, 31, false},
      {1, 1, 1, 1, false}, {70, 1, 16, 16, false}, {5, 1, 256, 65, false}, {2, 1, 300, 20, false},
      {16, 1, 72, 64, true}, {4, 1, 576, 512, true}, {3, 1, 9, 7, true}, {8, 1, 40, 130, false}, {14, 2, 64, 160, false},
  });
}

}  // namespace

TEST(attention_is_right_and_a_row_depends_on_its_sequence_alone) {
  for (int i = 0; i < run.tries(56); i++) {
    const bool is_long = i % 10 == 0;
    const int32_t type = run.pick<int32_t>({WL_F32, WL_BF16, WL_F16, WL_INT8});
    Case c(run, any_shape(run), type, run.between(1, 5), is_long ? 700 : 130, is_long ? 200 : 60);
    wl_set_threads(1);
    const std::vector<float> alone = c.call(c.tiles(run, 1, false));
    for (const Sequence &s : c.lists)
      for (int64_t head = 0; head < c.work.num_heads; head += 1 + c.work.num_heads / 3) {
        c.expect_right(alone, s, s.num_rows - 1, head);
        c.expect_right(alone, s, run.between(0, s.num_rows - 1), head);
      }
    c.expect_same(alone, c.call(c.tiles(run, MOST_TILE_ROWS, false)), "tiles");
    for (int32_t threads = 2; threads <= 4; threads++) {
      wl_set_threads(threads);
      c.expect_same(alone, c.call(c.tiles(run, run.pick<int64_t>({2, 5, 8, 17, 64}), true)), "tiles and threads");
    }
  }
  wl_set_threads(1);
}

TEST(what_no_row_may_see_is_not_seen) {
  // NaN in unused pages, behind the last position of used ones, and beside rows
  for (int i = 0; i < run.tries(40); i++) {
    const Case::Shape shape = any_shape(run);
    Case c(run, shape, WL_F32, run.between(1, 3), 100, 40);
    const std::vector<float> before = c.call(c.tiles(run, 16, false));
    for (Cache *cache : {&c.keys, &c.values}) {
      std::vector<uint8_t> seen(cache->bytes.size(), 0);
      const int64_t used = cache == &c.keys ? (shape.is_latent ? std::max(shape.d, shape.v) : shape.d) : shape.v;
      for (const Sequence &s : c.lists)
        for (int64_t t = 0; t < s.position + s.num_rows; t++)
          for (int64_t head = 0; head < c.kv_heads; head++) {
            const uint8_t *from = cache->at(s.pages[size_t(t / c.tokens)], head, t % c.tokens, 0);
            std::fill_n(seen.begin() + (from - cache->bytes.data()), used * 4, uint8_t(1));
          }
      for (size_t at = 0; at < seen.size(); at++)
        if (!seen[at]) cache->bytes[at] = 0xff;
    }
    c.expect_same(before, c.call(c.tiles(run, 16, false)), "what is not seen");
  }
}

TEST(attention_with_extreme_logits_stays_finite) {
  for (int i = 0; i < run.tries(30); i++) {
    Case c(run, any_shape(run), WL_F32, run.between(1, 3), 100, 40);
    const float factor = run.pick({1e4f, 1e8f, 1e-30f, test::DENORMAL});
    for (float &x : c.q) x *= factor;
    const std::vector<float> out = c.call(c.tiles(run, 16, false));
    for (size_t at = 0; at < out.size(); at++) CHECK(std::isfinite(out[at]), "%zu: %g", at, double(out[at]));
    c.expect_same(out, c.call(c.tiles(run, 64, true)), "extreme");
  }
}

TEST(a_query_of_nan_or_infinity_changes_no_other) {
  for (int i = 0; i < run.tries(30); i++) {
    Case c(run, any_shape(run), WL_F32, run.between(1, 3), 60, 40);
    const std::vector<float> before = c.call(c.tiles(run, 16, false));
    const int64_t per_row = c.work.num_heads * c.work.value_dim, bad = run.between(0, c.num_rows - 1);
    const int64_t head = run.between(0, c.work.num_heads - 1);
    c.q[size_t((bad * c.work.num_heads + head) * c.work.key_dim)] = run.pick({test::NOT_A_NUMBER, test::INF, -test::INF});
    const std::vector<float> after = c.call(c.tiles(run, 16, false));
    for (int64_t at = 0; at < c.num_rows * per_row; at++) {
      const bool is_its = at / per_row == bad && at % per_row / c.work.value_dim == head;
      if (is_its && std::isnan(c.q[size_t((bad * c.work.num_heads + head) * c.work.key_dim)])) CHECK(std::isnan(after[size_t(at)]), "NaN is lost");
      if (!is_its) CHECK(test::same(before[size_t(at)], after[size_t(at)]), "element %ld changed with row %ld head %ld", long(at), long(bad), long(head));
    }
  }
}
