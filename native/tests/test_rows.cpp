// Row-wise operations: normalisation, combination, rotation.
#include "matrices.h"

#include <algorithm>

namespace {

constexpr float UNTOUCHED = -12345.0f;

/// A weight vector of a stored type, ending with its last byte.
std::vector<uint8_t> stored(test::Run &run, int32_t type, int64_t count, std::vector<float> &values) {
  values.resize(size_t(count));
  std::vector<uint8_t> bytes(size_t(count * (type == WL_F32 ? 4 : 2)));
  for (int64_t i = 0; i < count; i++) {
    const float x = 1.0f + 0.3f * run.normal();
    const uint16_t half = test::usual_bits(run, type, -1);
    values[size_t(i)] = type == WL_F32 ? x : test::from_bits(type, half);
    if (type == WL_F32) std::memcpy(bytes.data() + 4 * i, &x, 4);
    else std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
  return bytes;
}

}  // namespace

TEST(rms_norm_is_right_and_a_row_depends_on_itself_alone) {
  for (int i = 0; i < run.tries(200); i++) {
    const bool is_large = i % 20 == 0;
    const int64_t rows = run.size(is_large ? 500 : 30), width = run.size(is_large ? 300 : 700);
    const int64_t ldx = width + run.pick<int64_t>({0, 0, 3}), ldy = width + run.pick<int64_t>({0, 0, 7});
    std::vector<float> x = run.normals((rows - 1) * ldx + width), weight;
    for (int64_t row = 0; row < rows; row++)
      if (run.chance(0.1)) x[size_t(row * ldx + run.between(0, width - 1))] = run.pick({test::INF, test::NOT_A_NUMBER, test::DENORMAL, 1e15f, 0.0f});
    const int32_t type = run.pick<int32_t>({WL_F32, WL_BF16, WL_F16});
    const std::vector<uint8_t> bytes = stored(run, type, width, weight);
    const float add = run.pick({0.0f, 1.0f}), eps = run.pick({1e-6f, 1e-5f, 1e-2f});
    std::vector<float> y(size_t((rows - 1) * ldy + width), UNTOUCHED);
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_rms_norm(x.data(), ldx, y.data(), ldy, rows, width, bytes.data(), type, add, eps) == WL_OK, "refused");
    for (int64_t row = 0; row < rows; row++) {
      const float *from = &x[size_t(row * ldx)], *to = &y[size_t(row * ldy)];
      double squares = 0;
      for (int64_t d = 0; d < width; d++) squares += double(from[d]) * double(from[d]);
      const double scale = 1 / std::sqrt(squares / double(width) + double(eps));
      for (int64_t d = 0; d < width; d++) {
        const double expected = double(from[d]) * scale * (double(weight[size_t(d)]) + double(add));
        CHECK(test::near(double(to[d]), expected, (3e-7 + 3e-8 * double(width / 8)) * std::fabs(expected) + 1e-37), "width %ld column %ld: %g, expected %g",
              long(width), long(d), double(to[d]), expected);
      }
      std::vector<float> alone(static_cast<size_t>(width));
      wl_rms_norm(from, ldx, alone.data(), width, 1, width, bytes.data(), type, add, eps);
      CHECK(test::first_difference(alone.data(), to, width) < 0, "row %ld of %ld alone", long(row), long(rows));
      for (int64_t d = width; d < ldy && row + 1 < rows; d++) CHECK(to[d] == UNTOUCHED, "beside a row");
    }
  }
  wl_set_threads(1);
}

TEST(combine_is_right_and_a_row_depends_on_itself_alone) {
  for (int i = 0; i < run.tries(200); i++) {
    const bool is_large = i % 20 == 0;
    const int64_t rows = run.size(is_large ? 200 : 20), width = run.size(is_large ? 300 : 500), per_row = run.between(1, 9);
    std::vector<float> outputs = run.normals(rows * per_row * width);
    for (float &x : outputs)
      if (run.chance(0.001)) x = run.pick({test::INF, test::NOT_A_NUMBER, test::DENORMAL});
    const std::vector<float> weights = run.normals(rows * per_row), shared = run.normals(rows * width), residual = run.normals(rows * width);
    const bool has_shared = run.chance(0.5), has_residual = run.chance(0.7);
    const float multiplier = run.pick({1.0f, 2.5f});
    std::vector<float> out = residual;  // in place
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_combine(outputs.data(), weights.data(), has_shared ? shared.data() : nullptr, has_residual ? out.data() : nullptr, out.data(), rows, per_row, width, multiplier) == WL_OK, "refused");
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t d = 0; d < width; d++) {
        const size_t at = size_t(row * width + d);
        double sum = has_shared ? double(shared[at]) : 0, size = std::fabs(sum);
        for (int64_t a = 0; a < per_row; a++) {
          const double term = double(weights[size_t(row * per_row + a)]) * double(outputs[size_t((row * per_row + a) * width + d)]);
          sum += term, size += std::fabs(term);
        }
        const double before = has_residual ? double(residual[at]) : 0, expected = before + double(multiplier) * sum;
        CHECK(test::near(double(out[at]), expected, 1e-6 * (double(multiplier) * size + std::fabs(before))), "row %ld column %ld: %g, expected %g",
              long(row), long(d), double(out[at]), expected);
      }
      std::vector<float> alone(static_cast<size_t>(width));
      wl_combine(&outputs[size_t(row * per_row * width)], &weights[size_t(row * per_row)], has_shared ? &shared[size_t(row * width)] : nullptr,
                 has_residual ? &residual[size_t(row * width)] : nullptr, alone.data(), 1, per_row, width, multiplier);
      CHECK(test::first_difference(alone.data(), &out[size_t(row * width)], width) < 0, "row %ld of %ld alone", long(row), long(rows));
    }
  }
  wl_set_threads(1);
}

TEST(rotate_is_right_and_a_row_depends_on_itself_alone) {
  for (int i = 0; i < run.tries(200); i++) {
    const bool is_large = i % 20 == 0;
    const int64_t rows = run.size(is_large ? 600 : 20), heads = run.between(1, 6), pairs = run.size(70), dim = 2 * pairs + run.pick<int64_t>({0, 0, 1, 6});
    const int64_t head_stride = dim + run.pick<int64_t>({0, 0, 3}), row_stride = (heads - 1) * head_stride + dim + run.pick<int64_t>({0, 0, 4});
    const int64_t table_stride = pairs + run.pick<int64_t>({0, 0, 2});
    const std::vector<float> x = run.normals((rows - 1) * row_stride + (heads - 1) * head_stride + dim);
    const std::vector<float> cos = run.normals((rows - 1) * table_stride + pairs), sin = run.normals((rows - 1) * table_stride + pairs);
    const int32_t interleaved = run.chance(0.5);
    std::vector<float> y = x;
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_rotate(y.data(), row_stride, head_stride, rows, heads, pairs, cos.data(), sin.data(), table_stride, interleaved) == WL_OK, "refused");
    std::vector<double> expected(x.begin(), x.end());
    for (int64_t row = 0; row < rows; row++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t p = 0; p < pairs; p++) {
          const size_t base = size_t(row * row_stride + head * head_stride), one = base + size_t(interleaved ? 2 * p : p);
          const size_t two = interleaved ? one + 1 : one + size_t(pairs);
          const double c = double(cos[size_t(row * table_stride + p)]), s = double(sin[size_t(row * table_stride + p)]);
          expected[one] = double(x[one]) * c - double(x[two]) * s;
          expected[two] = double(x[two]) * c + double(x[one]) * s;
        }
    for (size_t at = 0; at < x.size(); at++)
      CHECK(test::near(double(y[at]), expected[at], 3e-6), "%zu: %g, expected %g", at, double(y[at]), expected[at]);
    const int64_t row = run.between(0, rows - 1), length = (heads - 1) * head_stride + dim;
    std::vector<float> alone(x.begin() + row * row_stride, x.begin() + row * row_stride + length);
    wl_rotate(alone.data(), row_stride, head_stride, 1, heads, pairs, &cos[size_t(row * table_stride)], &sin[size_t(row * table_stride)], table_stride, interleaved);
    CHECK(test::first_difference(alone.data(), &y[size_t(row * row_stride)], length) < 0, "row %ld of %ld alone", long(row), long(rows));
  }
  wl_set_threads(1);
}

TEST(rows_are_written_where_they_belong_and_nowhere_else) {
  for (int i = 0; i < run.tries(200); i++) {
    const bool is_large = i % 20 == 0;
    const int64_t rows = run.size(is_large ? 400 : 20), heads = run.between(1, 6), width = run.size(90), tokens = run.between(1, 5);
    const int64_t head_stride = width + run.pick<int64_t>({0, 0, 3}), row_stride = (heads - 1) * head_stride + width + run.pick<int64_t>({0, 0, 4});
    std::vector<float> x = run.normals((rows - 1) * row_stride + (heads - 1) * head_stride + width);
    for (float &value : x)
      if (run.chance(0.01)) value = run.pick({test::INF, test::NOT_A_NUMBER, test::DENORMAL, 3.4e38f, -0.0f});
    const int32_t type = run.pick<int32_t>({WL_F32, WL_BF16, WL_F16});
    const int64_t item = type == WL_F32 ? 4 : 2, held = width + run.between(0, 3);
    std::vector<uint8_t> memory(size_t(rows * heads * tokens * held * item), 0xa5);
    const wl_cache cache{memory.data(), heads * tokens * held * item, tokens * held * item, held * item, held, type, nullptr};
    std::vector<int64_t> pages, offsets;
    for (int64_t row = 0; row < rows; row++) {
      pages.push_back(rows - 1 - row);
      offsets.push_back(run.between(0, tokens - 1));
    }
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_write_rows(x.data(), row_stride, head_stride, rows, heads, width, &cache, pages.data(), offsets.data(), 0) == WL_OK, "refused");
    std::vector<bool> is_written(memory.size());
    for (int64_t row = 0; row < rows; row++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t d = 0; d < width; d++) {
          const size_t at = size_t((((pages[size_t(row)] * heads + head) * tokens + offsets[size_t(row)]) * held + d) * item);
          const float from = x[size_t(row * row_stride + head * head_stride + d)];
          float got;
          uint16_t half;
          std::memcpy(&got, &memory[at], item == 4 ? 4 : 0);
          std::memcpy(&half, &memory[at], 2);
          if (item == 2) got = test::from_bits(type, half);
          const double most = type == WL_F32 ? 0 : std::fabs(double(from)) * (type == WL_BF16 ? 1.0 / 256 : 1.0 / 2048) + (type == WL_BF16 ? 1e-40 : 3e-8);
          const bool overflows = std::isinf(got) && std::fabs(from) >= (type == WL_F16 ? 65520.0f : 3.39e38f) && (got > 0) == (from > 0);
          CHECK(overflows || (std::isnan(from) ? std::isnan(got) : std::isinf(from) ? got == from : std::fabs(double(got) - double(from)) <= most), "row %ld head %ld column %ld: %g, expected %g",
                long(row), long(head), long(d), double(got), double(from));
          for (int64_t b = 0; b < item; b++) is_written[at + size_t(b)] = true;
        }
    for (size_t at = 0; at < memory.size(); at++) CHECK(is_written[at] || memory[at] == 0xa5, "byte %zu", at);
  }
  wl_set_threads(1);
  const wl_cache codes{nullptr, 0, 0, 0, 0, WL_INT8, nullptr};
  CHECK(wl_write_rows(nullptr, 0, 0, 0, 0, 0, &codes, nullptr, nullptr, 1) == WL_E_ARGUMENT, "int8 rows have scales");
}

TEST(int8_rows_have_codes_and_a_scale_of_their_own) {
  for (int i = 0; i < run.tries(200); i++) {
    const int64_t rows = run.size(40), heads = run.between(1, 4), width = run.size(90), tokens = run.between(1, 5), held = width + run.between(0, 3);
    std::vector<float> x = run.normals(rows * heads * width);
    for (float &value : x)
      if (run.chance(0.01)) value = run.pick({test::INF, test::NOT_A_NUMBER, test::DENORMAL, 3.4e38f, 0.0f});
    if (run.chance(0.2)) std::fill_n(x.begin(), width, 0.0f);
    std::vector<uint8_t> memory(size_t(rows * heads * tokens * held), 0xa5);
    std::vector<float> scales(size_t(rows * heads * tokens), UNTOUCHED);
    const wl_cache cache{memory.data(), heads * tokens * held, tokens * held, held, held, WL_INT8, scales.data()};
    std::vector<int64_t> pages, offsets;
    for (int64_t row = 0; row < rows; row++) {
      pages.push_back(rows - 1 - row);
      offsets.push_back(run.between(0, tokens - 1));
    }
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_write_rows(x.data(), heads * width, width, rows, heads, width, &cache, pages.data(), offsets.data(), tokens) == WL_OK, "refused");
    for (int64_t row = 0; row < rows; row++)
      for (int64_t head = 0; head < heads; head++) {
        const float *from = &x[size_t((row * heads + head) * width)];
        const size_t at = size_t((pages[size_t(row)] * heads + head) * tokens + offsets[size_t(row)]);
        float top = 0;
        bool is_finite = true;
        for (int64_t d = 0; d < width; d++) {
          top = std::max(top, std::fabs(from[d]));
          is_finite &= std::isfinite(from[d]) != 0;
        }
        CHECK(is_finite ? scales[at] == top / 127.0f : !std::isfinite(scales[at]), "scale %g of %g", double(scales[at]), double(top));
        for (int64_t d = 0; d < width; d++) {
          const int code = memory[at * size_t(held) + size_t(d)];
          const float step = scales[at] == 0 ? 1.0f : scales[at];
          const int expected = is_finite ? int(std::nearbyint(from[d] / step)) + 128 : 128;
          CHECK(code == expected, "row %ld head %ld column %ld: %d, expected %d", long(row), long(head), long(d), code, expected);
        }
        for (int64_t d = width; d < held; d++) CHECK(memory[at * size_t(held) + size_t(d)] == 0xa5, "beside a row");
      }
    CHECK(std::count(scales.begin(), scales.end(), UNTOUCHED) == rows * heads * (tokens - 1), "other scales");
  }
  wl_set_threads(1);
}

TEST(rows_are_copied_and_gated) {
  for (int i = 0; i < run.tries(200); i++) {
    const bool is_large = i % 20 == 0, is_one = run.chance(0.5);
    const int64_t rows = run.size(is_large ? 500 : 20), heads = run.between(1, 5), width = run.size(90);
    const int64_t from_head = width + run.between(0, 3), to_head = width + run.between(0, 3);
    const std::vector<float> x = run.normals(rows * heads * from_head);
    std::vector<float> out(size_t(rows * heads * to_head), UNTOUCHED);
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_copy_rows(x.data(), heads * from_head, from_head, rows, heads, width, out.data(), heads * to_head, to_head) == WL_OK, "refused");
    for (int64_t head = 0; head < rows * heads; head++)
      for (int64_t d = 0; d < to_head; d++) {
        const float expected = d < width ? x[size_t(head * from_head + d)] : UNTOUCHED;
        CHECK(out[size_t(head * to_head + d)] == expected, "head %ld column %ld", long(head), long(d));
      }
    const int64_t all = heads * to_head;
    std::vector<float> gate = run.normals(is_one ? rows : rows * all), gated = out;
    for (float &value : gate)
      if (run.chance(0.02)) value = run.pick({test::INF, -test::INF, test::NOT_A_NUMBER, 100.0f, -100.0f});
    CHECK(wl_gate(gated.data(), rows, all, gate.data(), is_one) == WL_OK, "refused");
    for (int64_t at = 0; at < rows * all; at++) {
      const double by = 1 / (1 + std::exp(-double(gate[size_t(is_one ? at / all : at)]))), expected = double(out[size_t(at)]) * by;
      CHECK(test::near(double(gated[size_t(at)]), expected, 1e-6 * std::fabs(expected) + 1e-30), "%g, expected %g", double(gated[size_t(at)]), expected);
    }
    std::vector<float> last(out.end() - all, out.end());
    CHECK(wl_gate(last.data(), 1, all, gate.data() + gate.size() - (is_one ? 1 : size_t(all)), is_one) == WL_OK, "refused");
    CHECK(test::first_difference(last.data(), &gated[size_t((rows - 1) * all)], all) < 0, "a row alone");
  }
  wl_set_threads(1);
}

TEST(places_are_grouped_by_expert_in_their_order) {
  for (int i = 0; i < run.tries(200); i++) {
    const int64_t num = run.size(500), per_row = run.between(1, 8), experts = run.size(70);
    std::vector<int64_t> ids, order(size_t(num), -1), rows(size_t(num), -1), counts(size_t(experts), -1);
    for (int64_t place = 0; place < num; place++) ids.push_back(run.between(0, experts - 1));
    CHECK(wl_group(ids.data(), num, per_row, experts, order.data(), rows.data(), counts.data()) == WL_OK, "refused");
    size_t at = 0;
    for (int64_t expert = 0; expert < experts; expert++) {
      int64_t count = 0;
      for (int64_t place = 0; place < num; place++) {
        if (ids[size_t(place)] != expert) continue;
        CHECK(order[at] == place && rows[at] == place / per_row, "place %zu: %ld of row %ld", at, long(order[at]), long(rows[at]));
        at++, count++;
      }
      CHECK(counts[size_t(expert)] == count, "expert %ld", long(expert));
    }
  }
}

TEST(all_is_read_and_nothing_beside) {
  for (int i = 0; i < run.tries(60); i++) {
    const int64_t numbers = run.size(60000);
    const std::vector<float> x(static_cast<size_t>(numbers), 1.0f);
    float sum = -1;
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_read(x.data(), 4 * numbers, &sum) == WL_OK, "refused");
    CHECK(sum >= 0 && sum <= float(numbers), "%g of %ld", double(sum), long(numbers));
  }
  wl_set_threads(1);
}
