// wl_products against sums in double precision, and bit for bit against itself.
#include <memory>

#include "matrices.h"

using test::Run;
using test::Stored;

namespace {

constexpr float UNTOUCHED = -12345.0f;

/// Products over the same rows, results side by side in one buffer.
struct Products {
  explicit Products(int64_t num_rows) : rows(num_rows) {}

  /// One more product, of the last one's x if that is as wide and `shares`.
  void add(Run &run, const test::Storage &storage, int64_t n, int64_t k, bool shares = false) {
    if (inputs.empty() || matrices.back()->m.k != k || !shares) {
      ldx.push_back(k + run.pick<int64_t>({0, 0, 1, 5}));
      inputs.push_back(run.normals((rows - 1) * ldx.back() + k));
    }
    matrices.push_back(std::make_unique<Stored>(run, storage, n, k));
    input_of.push_back(inputs.size() - 1);
    has_bias.push_back(run.chance(0.5));
    biases.push_back(run.normals(n));
    column.push_back(ldo);
    ldo += n + run.pick<int64_t>({0, 0, 2});
  }

  /// Rows `first` to `last` of a call, as a buffer of all rows; what is not written stays.
  void call(int64_t first, int64_t last, std::vector<float> &out) const {
    std::vector<wl_product> list;
    for (size_t i = 0; i < matrices.size(); i++)
      list.push_back({x(i, first), ldx[input_of[i]], &matrices[i]->m, has_bias[i] ? biases[i].data() : nullptr,
                      out.data() + first * ldo + column[i], ldo});
    CHECK(wl_products(list.data(), int64_t(list.size()), last - first, precision) == WL_OK, "refused");
  }
  const float *x(size_t i, int64_t row) const { return inputs[input_of[i]].data() + row * ldx[input_of[i]]; }
  std::vector<float> buffer() const {
    const int64_t last = column.back() + matrices.back()->m.n;
    return std::vector<float>(size_t((rows - 1) * ldo + last), UNTOUCHED);
  }

  int64_t rows, ldo = 0;
  int32_t precision = WL_FP32_ACTIVATIONS;
  std::vector<std::unique_ptr<Stored>> matrices;
  std::vector<std::vector<float>> inputs, biases;
  std::vector<int64_t> ldx, column;
  std::vector<size_t> input_of;
  std::vector<bool> has_bias;
};

void expect_right(const Products &p, const std::vector<float> &out, int64_t row) {
  std::vector<bool> written(size_t(p.ldo), false);
  for (size_t i = 0; i < p.matrices.size(); i++) {
    const wl_matrix &m = p.matrices[i]->m;
    std::vector<double> expected(size_t(m.n)), bounds(size_t(m.n));
    test::multiply(p.x(i, row), *p.matrices[i], p.precision, p.has_bias[i] ? p.biases[i].data() : nullptr, expected.data(), bounds.data());
    for (int64_t n = 0; n < m.n; n++) {
      const float got = out[size_t(row * p.ldo + p.column[i] + n)];
      written[size_t(p.column[i] + n)] = true;
      CHECK(test::near(double(got), expected[size_t(n)], bounds[size_t(n)]), "%s (%ld, %ld) precision %d row %ld of %ld, column %ld: %g, expected %g",
            test::name_of(p.matrices[i]->storage), long(m.n), long(m.k), p.precision, long(row), long(p.rows), long(n), double(got), expected[size_t(n)]);
    }
  }
  for (int64_t n = 0; n < p.ldo && row * p.ldo + n < int64_t(out.size()); n++)
    CHECK(written[size_t(n)] || out[size_t(row * p.ldo + n)] == UNTOUCHED, "column %ld between results was written", long(n));
}

void expect_same(const Products &p, const std::vector<float> &a, const std::vector<float> &b, const char *what) {
  const int64_t at = test::first_difference(a.data(), b.data(), int64_t(a.size()));
  CHECK(at < 0, "%s: row %ld of %ld, column %ld", what, long(at / p.ldo), long(p.rows), long(at % p.ldo));
}

}  // namespace

TEST(products_of_every_storage) {
  for (int i = 0; i < run.tries(6); i++)
    for (const test::Storage &storage : test::all_storages(run)) {
      Products p(run.size(20));
      p.precision = run.chance(0.5);
      p.add(run, storage, run.size(100), run.size(600));
      std::vector<float> out = p.buffer();
      wl_set_threads(int32_t(run.between(1, 3)));
      p.call(0, p.rows, out);
      expect_right(p, out, run.between(0, p.rows - 1));
    }
  wl_set_threads(1);
}

TEST(products_are_right_and_depend_on_their_row_alone) {
  for (int i = 0; i < run.tries(48); i++) {
    const bool is_large = i % 16 == 0;
    const int64_t rows = is_large ? run.between(500, 1100) : run.size(70);
    Products p(rows);
    p.precision = run.chance(0.5);
    int64_t k = 0;
    for (int64_t num = run.between(1, 4); num; num--) {
      if (!k || run.chance(0.3)) k = run.size(is_large ? 300 : 700);
      p.add(run, test::any_storage(run), run.size(is_large ? 40 : 300), k, run.chance(0.7));
    }
    wl_set_threads(1);
    std::vector<float> whole = p.buffer();
    p.call(0, rows, whole);
    expect_right(p, whole, 0);
    expect_right(p, whole, run.between(0, rows - 1));
    for (int32_t threads = 2; threads <= 4; threads++) {
      wl_set_threads(threads);
      std::vector<float> other = p.buffer();
      p.call(0, rows, other);
      expect_same(p, whole, other, "threads");
    }
    wl_set_threads(int32_t(run.between(1, 3)));
    std::vector<float> cut = p.buffer();
    for (int64_t first = 0, last; first < rows; first = last) {
      last = std::min(rows, first + run.pick<int64_t>({1, 1, 2, run.between(1, rows)}));
      p.call(first, last, cut);
    }
    expect_same(p, whole, cut, "chunks");
  }
  wl_set_threads(1);
}

TEST(few_rows_give_the_bits_of_many) {
  for (int i = 0; i < run.tries(4); i++)
    for (const test::Storage &storage : test::all_storages(run)) {
      Products p(run.between(9, 20));
      p.precision = run.chance(0.3);
      p.add(run, storage, run.size(300), run.size(700));
      std::vector<float> whole = p.buffer(), cut = p.buffer();
      p.call(0, p.rows, whole);
      wl_set_threads(int32_t(run.between(1, 3)));
      for (int64_t first = 0, last; first < p.rows; first = last) {
        last = std::min(p.rows, first + run.between(1, 9));
        p.call(first, last, cut);
      }
      expect_same(p, whole, cut, test::name_of(storage));
    }
  wl_set_threads(1);
}

TEST(products_in_several_rounds) {
  Products p(512);  // packed rows of three inputs are beyond what one round holds
  for (int i = 0; i < 3; i++) p.add(run, {.code = WL_BF16, .packing = WL_ROWS}, 3, 6000);
  std::vector<float> out = p.buffer();
  wl_set_threads(2);
  p.call(0, 512, out);
  for (int64_t row : {0, 100, 511}) expect_right(p, out, row);
  wl_set_threads(1);
}

TEST(infinities_nans_and_denormals_of_a_row_or_column_stay_there) {
  for (int i = 0; i < run.tries(40); i++) {
    Products p(run.size(30));
    p.precision = run.chance(0.5);
    p.add(run, test::any_storage(run), run.size(200), run.size(600));
    const wl_matrix &m = p.matrices[0]->m;
    std::vector<float> before = p.buffer(), after = p.buffer();
    p.call(0, p.rows, before);
    const int64_t bad = run.between(0, p.rows - 1);
    for (int64_t k = 0; k < m.k; k++) {
      float &x = p.inputs[0][size_t(bad * p.ldx[0] + k)];
      if (run.chance(0.1)) x = run.pick({test::DENORMAL, -0.0f, 1e30f, 1e-38f});
    }
    if (run.chance(0.7)) p.inputs[0][size_t(bad * p.ldx[0] + run.between(0, m.k - 1))] = run.pick({test::INF, -test::INF, test::NOT_A_NUMBER});
    p.call(0, p.rows, after);
    expect_right(p, after, bad);
    for (int64_t row = 0; row < p.rows; row++)
      CHECK(row == bad || test::first_difference(&before[size_t(row * p.ldo)], &after[size_t(row * p.ldo)], m.n) < 0,
            "row %ld changed with row %ld", long(row), long(bad));
  }
}

TEST(a_column_of_nan_changes_no_other) {
  for (int32_t code : {WL_F32, WL_BF16, WL_F16})
    for (int i = 0; i < run.tries(8); i++) {
      Products p(run.size(20));
      p.precision = run.chance(0.5);
      p.add(run, {.code = code, .packing = WL_ROWS}, run.size(80), run.size(300));
      const Stored &s = *p.matrices[0];
      const int64_t bad = run.between(0, s.m.n - 1), item = code == WL_F32 ? 4 : 2;
      uint8_t *at = const_cast<uint8_t *>(static_cast<const uint8_t *>(s.m.codes)) + bad * s.m.stride_n + run.between(0, s.m.k - 1) * s.m.stride_k;
      std::memset(at, 0xff, size_t(item));
      std::vector<float> out = p.buffer();
      p.call(0, p.rows, out);
      expect_right(p, out, p.rows - 1);
      CHECK(std::isnan(out[size_t(bad)]), "column %ld", long(bad));
    }
}

TEST(nothing_to_do_is_done) {
  const Stored s(run, {.code = WL_F32, .packing = WL_ROWS}, 3, 4);
  const wl_product product{nullptr, 4, &s.m, nullptr, nullptr, 3};
  CHECK(wl_products(&product, 1, 0, WL_FP32_ACTIVATIONS) == WL_OK, "no rows");
  CHECK(wl_products(nullptr, 0, 5, WL_FP32_ACTIVATIONS) == WL_OK, "no products");
}
