// wl_experts against the same network in double precision, and bit for bit against itself.
#include <memory>
#include <numeric>

#include "matrices.h"

using test::Run;
using test::Stored;

namespace {

constexpr float UNTOUCHED = -12345.0f, ALPHA = 1.702f, LIMIT = 7.0f;

struct Network {
  Network(Run &run, int64_t width, int64_t inner, const test::Storage &storage) {
    gate = std::make_unique<Stored>(run, storage, inner, width);
    up = std::make_unique<Stored>(run, run.chance(0.5) ? storage : test::any_storage(run), inner, width);
    down = std::make_unique<Stored>(run, test::any_storage(run), width, inner);
    has_bias = run.chance(0.4);
    gate_bias = run.normals(inner), up_bias = run.normals(inner), down_bias = run.normals(width);
  }
  wl_expert expert() const {
    wl_expert e{};
    e.gate = &gate->m, e.up = &up->m, e.down = &down->m;
    if (has_bias) e.gate_bias = gate_bias.data(), e.up_bias = up_bias.data(), e.down_bias = down_bias.data();
    return e;
  }
  std::unique_ptr<Stored> gate, up, down;
  std::vector<float> gate_bias, up_bias, down_bias;
  bool has_bias;
};

/// What the sigmoid of an activation is taken of.
double turned(int kind, double gate) {
  if (kind == WL_GEGLU) return 2 * std::sqrt(2 / std::acos(-1.0)) * (gate + 0.044715 * gate * gate * gate);
  return kind == WL_SWIGLU ? gate : double(ALPHA) * gate;
}

double activate(int kind, double gate, double up) {
  if (kind == WL_RELU_SQUARED) return up > 0 ? up * up : 0;
  if (kind != WL_CLAMPED_SWIGLU) return gate / (1 + std::exp(-turned(kind, gate))) * up;
  gate = gate > double(LIMIT) ? double(LIMIT) : gate;
  up = up > double(LIMIT) ? double(LIMIT) : up < -double(LIMIT) ? -double(LIMIT) : up;
  return (up + 1) * gate / (1 + std::exp(-turned(kind, gate)));
}

/// How much activate(gate, up) changes where its arguments change by `g` and `u`.
double slope(int kind, double gate, double up, double g, double u) {
  if (kind == WL_RELU_SQUARED) return (2 * std::fabs(up) + u) * u;
  const double one = 1.2 * (std::fabs(up) + 1) * (kind == WL_CLAMPED_SWIGLU ? double(ALPHA) + 1 : 1.0);
  return one * g + (std::fabs(gate) + g) * u;
}

/// One row through a network, and how far single precision may be off.
void reference(const Network &net, int kind, int32_t precision, const float *x, std::vector<double> &out, std::vector<double> &bounds) {
  const int64_t width = net.gate->m.k, inner = net.gate->m.n;
  std::vector<double> gate(size_t(inner), 0.0), up(gate), gate_bound(gate), up_bound(gate);
  test::multiply(x, *net.gate, precision, net.has_bias ? net.gate_bias.data() : nullptr, gate.data(), gate_bound.data());
  test::multiply(x, *net.up, precision, net.has_bias ? net.up_bias.data() : nullptr, up.data(), up_bound.data());
  const std::vector<float> down = net.down->all();
  out.assign(size_t(width), 0.0);
  bounds.assign(size_t(width), 0.0);
  for (int64_t i = 0; i < width; i++) {
    double sum = net.has_bias ? double(net.down_bias[size_t(i)]) : 0, size = std::fabs(sum), carried = 0;
    for (int64_t j = 0; j < inner; j++) {
      const size_t at = size_t(j);
      const double h = activate(kind, gate[at], up[at]), w = double(down[size_t(i * inner + j)]);
      sum += h * w;
      size += std::fabs(h * w);
      const double rounding = precision == WL_BF16_ACTIVATIONS ? 0.0041 : 0;  // of hidden values, and of w
      carried += std::fabs(w) * (slope(kind, gate[at], up[at], gate_bound[at], up_bound[at]) + (1e-6 + 2 * rounding) * std::fabs(h) + 1e-37);
    }
    out[size_t(i)] = sum;
    bounds[size_t(i)] = carried + double(inner + 2) * std::ldexp(size, -24);
  }
}

/// Experts over rows of one x; every place of the output belongs to one row of one expert.
struct Case {
  Case(Run &run, int64_t num_rows, int64_t num, int64_t most_width, int64_t most_inner) : rows_of_x(num_rows) {
    width = run.size(most_width);
    ldx = width + run.pick<int64_t>({0, 0, 3}), ldo = width + run.pick<int64_t>({0, 0, 5});
    x = run.normals((num_rows - 1) * ldx + width);
    kind = run.pick<int32_t>({WL_SWIGLU, WL_CLAMPED_SWIGLU, WL_GEGLU, WL_RELU_SQUARED});
    precision = run.chance(0.4) ? WL_BF16_ACTIVATIONS : WL_FP32_ACTIVATIONS;
    const int64_t inner = run.size(most_inner);
    const test::Storage storage = test::any_storage(run);
    int64_t total = 0;
    for (int64_t i = 0; i < num; i++) {
      networks.push_back(std::make_unique<Network>(run, width, inner, storage));
      std::vector<int64_t> list;
      for (int64_t row = 0; row < num_rows; row++)
        if (num == 1 || run.chance(0.6)) list.push_back(row);
      total += int64_t(list.size());
      rows.push_back(list);
    }
    std::vector<int64_t> order(size_t(total), 0);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[size_t(run.between(0, int64_t(i) - 1))]);
    for (const auto &list : rows) {
      places.emplace_back(order.end() - int64_t(list.size()), order.end());
      order.resize(order.size() - list.size());
    }
    num_places = total;
  }
  std::vector<float> buffer() const { return std::vector<float>(size_t(std::max<int64_t>(0, (num_places - 1) * ldo + width)), UNTOUCHED); }
  void call(const std::vector<wl_expert> &list, std::vector<float> &out) const {
    CHECK(wl_experts(x.data(), ldx, out.data(), ldo, list.data(), int64_t(list.size()), kind, ALPHA, LIMIT, precision) == WL_OK, "refused");
  }
  std::vector<wl_expert> all() const {
    std::vector<wl_expert> list;
    for (size_t i = 0; i < networks.size(); i++) list.push_back(part(i, 0, int64_t(rows[i].size())));
    return list;
  }
  wl_expert part(size_t i, int64_t first, int64_t last) const {
    wl_expert e = networks[i]->expert();
    if (kind == WL_RELU_SQUARED) e.gate = nullptr, e.gate_bias = nullptr;
    e.rows = rows[i].data() + first, e.places = places[i].data() + first, e.num_rows = last - first;
    return e;
  }
  void expect_right(const std::vector<float> &out, size_t i, int64_t at) const {
    std::vector<double> expected, bounds;
    reference(*networks[i], kind, precision, x.data() + rows[i][size_t(at)] * ldx, expected, bounds);
    for (int64_t d = 0; d < width; d++) {
      const double got = double(out[size_t(places[i][size_t(at)] * ldo + d)]);
      CHECK(test::near(got, expected[size_t(d)], bounds[size_t(d)]), "%s width %ld inner %ld expert %zu row %ld column %ld: %g, expected %g within %g",
            test::name_of(networks[i]->gate->storage), long(width), long(networks[i]->gate->m.n), i, long(at), long(d), got, expected[size_t(d)], bounds[size_t(d)]);
    }
  }
  void expect_same(const std::vector<float> &a, const std::vector<float> &b, const char *what) const {
    const int64_t at = test::first_difference(a.data(), b.data(), int64_t(a.size()));
    CHECK(at < 0, "%s: place %ld, column %ld", what, long(at / ldo), long(at % ldo));
  }

  int64_t rows_of_x, width = 0, ldx = 0, ldo = 0, num_places = 0;
  int32_t kind = 0, precision = WL_FP32_ACTIVATIONS;
  std::vector<float> x;
  std::vector<std::unique_ptr<Network>> networks;
  std::vector<std::vector<int64_t>> rows, places;
};

}  // namespace

TEST(experts_are_right_and_a_row_depends_on_itself_alone) {
  for (int i = 0; i < run.tries(40); i++) {
    const bool is_large = i % 16 == 0;
    Case c(run, is_large ? run.between(500, 1100) : run.size(60), run.between(1, 5), is_large ? 40 : 300, is_large ? 30 : 300);
    if (!c.num_places) continue;
    wl_set_threads(1);
    std::vector<float> whole = c.buffer();
    c.call(c.all(), whole);
    for (size_t e = 0; e < c.networks.size(); e++)
      if (!c.rows[e].empty()) c.expect_right(whole, e, run.between(0, int64_t(c.rows[e].size()) - 1));
    for (int64_t place = 0; place + 1 < c.num_places; place++)
      for (int64_t d = c.width; d < c.ldo; d++) CHECK(whole[size_t(place * c.ldo + d)] == UNTOUCHED, "beside a row");
    for (int32_t threads = 2; threads <= 4; threads++) {
      wl_set_threads(threads);
      std::vector<float> other = c.buffer();
      c.call(c.all(), other);
      c.expect_same(whole, other, "threads");
    }
    // each expert's rows in pieces, last pieces first, in calls of a few
    std::vector<wl_expert> pieces;
    for (size_t e = 0; e < c.networks.size(); e++)
      for (int64_t first = 0, last, num = int64_t(c.rows[e].size()); first < num; first = last) {
        last = std::min(num, first + run.pick<int64_t>({1, 2, run.between(1, num)}));
        pieces.push_back(c.part(e, first, last));
      }
    std::vector<float> cut = c.buffer();
    while (!pieces.empty()) {
      const size_t few = std::min(pieces.size(), size_t(run.between(1, 3)));
      c.call({pieces.end() - int64_t(few), pieces.end()}, cut);
      pieces.resize(pieces.size() - few);
    }
    c.expect_same(whole, cut, "pieces");
  }
  wl_set_threads(1);
}

TEST(experts_without_lists_take_rows_in_order) {
  Case c(run, 37, 1, 64, 48);
  std::vector<float> whole = c.buffer(), plain = c.buffer();
  std::iota(c.places[0].begin(), c.places[0].end(), 0);
  c.call(c.all(), whole);
  wl_expert e = c.part(0, 0, 37);
  e.rows = e.places = nullptr;
  c.call({e}, plain);
  c.expect_same(whole, plain, "no lists");
}

TEST(experts_in_several_rounds) {
  Case c(run, 512, 1, 1, 1);
  c.width = c.ldx = c.ldo = 6000;
  c.x = run.normals(512 * 6000);
  c.networks.clear();
  c.rows.assign(3, std::vector<int64_t>(512)), c.places.assign(3, std::vector<int64_t>(512));
  c.num_places = 3 * 512;
  for (size_t i = 0; i < 3; i++) {
    c.networks.push_back(std::make_unique<Network>(run, 6000, 3, test::Storage{.code = WL_BF16, .packing = WL_ROWS}));
    std::iota(c.rows[i].begin(), c.rows[i].end(), 0);
    std::iota(c.places[i].begin(), c.places[i].end(), int64_t(512 * i));
  }
  wl_set_threads(2);
  std::vector<float> out = c.buffer();
  c.call(c.all(), out);
  for (size_t i = 0; i < 3; i++) c.expect_right(out, i, int64_t(100 * i));
  wl_set_threads(1);
}

TEST(experts_with_extreme_rows) {
  for (int i = 0; i < run.tries(24); i++) {
    Case c(run, run.size(20), 1, 100, 100);
    std::vector<float> before = c.buffer(), after = c.buffer();
    c.call(c.all(), before);
    const int64_t bad = run.between(0, c.rows_of_x - 1);
    const float value = run.pick({test::INF, -test::INF, test::NOT_A_NUMBER, 1e38f, -1e38f, test::DENORMAL});
    c.x[size_t(bad * c.ldx + run.between(0, c.width - 1))] = value;
    c.call(c.all(), after);
    for (int64_t row = 0; row < c.rows_of_x; row++) {
      const int64_t at = c.places[0][size_t(row)] * c.ldo;
      CHECK(row == bad || test::first_difference(&before[size_t(at)], &after[size_t(at)], c.width) < 0, "row %ld changed with row %ld", long(row), long(bad));
      if (row == bad && std::isnan(value))
        for (int64_t d = 0; d < c.width; d++) CHECK(std::isnan(after[size_t(at + d)]), "NaN is lost at column %ld", long(d));
    }
  }
}

TEST(activations_over_their_whole_range) {
  // one hidden value: gate = x0, up = x1, out = its activation
  const float scale[2][2] = {{1, 0}, {0, 1}}, one[2] = {1, 0};
  wl_matrix gate{}, up{}, down{};
  for (wl_matrix *m : {&gate, &up, &down}) m->code = WL_F32, m->n = 1, m->k = 2, m->stride_n = 8, m->stride_k = 4, m->block_n = m->block_k = 1;
  gate.codes = scale[0], up.codes = scale[1], down.codes = one;
  down.n = 2, down.k = 1, down.stride_n = 4;
  wl_expert e{};
  e.gate = &gate, e.up = &up, e.down = &down;
  for (int32_t kind : {WL_SWIGLU, WL_CLAMPED_SWIGLU, WL_GEGLU, WL_RELU_SQUARED}) {
    if (kind == WL_RELU_SQUARED) e.gate = nullptr;
    for (int i = 0; i < run.tries(4000); i++) {
      float x[2] = {run.normal() * run.pick({1.0f, 10.0f, 60.0f, 100.0f}), run.normal() * run.pick({1.0f, 30.0f})}, out[2];
      if (run.chance(0.1)) x[0] = run.pick({0.0f, -0.0f, test::DENORMAL, 87.0f, -87.0f, 88.7f, -88.7f, 1e30f, -1e30f, 104.0f, -104.0f});
      e.num_rows = 1;
      CHECK(wl_experts(x, 2, out, 2, &e, 1, kind, ALPHA, LIMIT, WL_FP32_ACTIVATIONS) == WL_OK, "refused");
      const double expected = activate(kind, double(x[0]), double(x[1]));
      // the exponent is rounded; exp overflows just below where it would in double: then this is 0
      const double relative = 1e-6 + std::ldexp(std::fabs(turned(kind, double(x[0]))) + std::fabs(double(ALPHA * x[0])), -23);
      CHECK(test::near(double(out[0]), expected, relative * std::fabs(expected) + 1e-35 * (std::fabs(double(x[1])) + 1)), "kind %d gate %g up %g: %g, expected %g",
            kind, double(x[0]), double(x[1]), double(out[0]), expected);
    }
  }
}
