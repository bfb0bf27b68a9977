// Which experts rows go to, and calls that are run from a list.
#include <algorithm>
#include <numeric>

#include "matrices.h"

namespace {

/// Of one row's experts, before the bias, in double.
std::vector<double> scores_of(const wl_routing &r, const float *logits, int64_t experts) {
  std::vector<double> scores(logits, logits + experts);
  double sum = 0;
  for (double x : scores) sum += std::exp(x);
  for (double &x : scores) x = r.score == WL_SOFTMAX ? std::exp(x) / sum : r.score == WL_SIGMOID ? 1 / (1 + std::exp(-x)) : x;
  return scores;
}

/// Whoever asks for scores gets them, and the same experts and weights.
void expect_scores(const wl_routing &r, const std::vector<float> &logits, int64_t rows, int64_t experts,
                   const std::vector<float> &weights, const std::vector<int64_t> &ids) {
  std::vector<float> scores(size_t(rows * experts)), again(weights.size());
  std::vector<int64_t> same(ids.size());
  CHECK(wl_route(logits.data(), rows, experts, &r, again.data(), same.data(), scores.data()) == WL_OK, "refused");
  CHECK(same == ids, "other experts");
  CHECK(test::first_difference(again.data(), weights.data(), int64_t(weights.size())) < 0, "other weights");
  for (int64_t row = 0; row < rows; row++) {
    const auto expected = scores_of(r, &logits[size_t(row * experts)], experts);
    for (int64_t e = 0; e < experts; e++) {
      const double got = double(scores[size_t(row * experts + e)]), x = expected[size_t(e)];
      CHECK(test::near(got, x, 3e-6 * std::abs(x)), "score %g, expected %g", got, x);
    }
  }
}

/// Weights by expert of one row, in double.
std::vector<std::pair<int64_t, double>> expected_of(const wl_routing &r, const float *logits, int64_t experts) {
  const std::vector<double> scores = scores_of(r, logits, experts);
  std::vector<double> choice = scores;
  for (int64_t e = 0; e < experts; e++) choice[size_t(e)] += r.bias ? double(r.bias[e]) : 0;
  if (r.num_groups) {
    const int64_t each = experts / r.num_groups;
    std::vector<std::pair<double, int64_t>> ranks;
    for (int64_t g = 0; g < r.num_groups; g++) {
      std::vector<double> group(choice.begin() + g * each, choice.begin() + (g + 1) * each);
      std::sort(group.rbegin(), group.rend());
      ranks.push_back({-(group[0] + (r.rank_by_two && each > 1 ? group[1] : 0)), g});
    }
    std::sort(ranks.begin(), ranks.end());
    for (int64_t g = r.kept_groups; g < r.num_groups; g++) std::fill_n(choice.begin() + ranks[size_t(g)].second * each, each, -INFINITY);
  }
  std::vector<int64_t> order(static_cast<size_t>(experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return choice[size_t(a)] > choice[size_t(b)]; });
  order.resize(size_t(r.top_k));
  double size = r.norm == WL_N_PLUS ? double(r.norm_by) : 0;
  for (int64_t e : order) {
    const double x = scores[size_t(e)];
    size += r.score == WL_LOGITS ? std::exp(x) : r.norm == WL_N_EUCLID ? x * x : x;
  }
  if (r.norm == WL_N_EUCLID) size = std::sqrt(size);
  if (r.norm == WL_N_SUM || r.norm == WL_N_EUCLID) size = std::max(size, double(r.norm_by));
  if (r.norm == WL_N_NONE && r.score != WL_LOGITS) size = 1;
  std::vector<std::pair<int64_t, double>> found;
  for (int64_t e : order) {
    const double x = r.score == WL_LOGITS ? std::exp(scores[size_t(e)]) : scores[size_t(e)];
    found.push_back({e, x / size * double(r.scale) * (r.factors ? double(r.factors[e]) : 1.0)});
  }
  return found;
}

}  // namespace

TEST(rows_find_their_experts) {
  for (int i = 0; i < run.tries(400); i++) {
    const bool is_large = i % 20 == 0;
    const int64_t groups = run.between(1, 4), experts = groups * run.size(is_large ? 128 : 20), rows = run.size(is_large ? 300 : 8);
    wl_routing r{};
    r.score = run.pick<int32_t>({WL_SOFTMAX, WL_SIGMOID, WL_LOGITS});
    r.norm = r.score == WL_LOGITS ? WL_N_NONE : run.pick<int32_t>({WL_N_NONE, WL_N_SUM, WL_N_EUCLID, WL_N_PLUS});
    r.norm_by = run.pick({0.0f, 0.5f, 1e-20f}), r.scale = run.pick({1.0f, 2.5f});
    if (run.chance(0.3)) {
      r.num_groups = groups, r.kept_groups = run.between(1, groups), r.rank_by_two = run.chance(0.5);
    }
    r.top_k = run.between(1, std::min<int64_t>(10, r.num_groups ? r.kept_groups * (experts / groups) : experts));
    const std::vector<float> bias = run.normals(experts), logits = run.normals(rows * experts), factors = run.normals(experts);
    if (run.chance(0.3)) r.bias = bias.data();
    if (run.chance(0.3)) r.factors = factors.data();
    std::vector<float> weights(size_t(rows * r.top_k));
    std::vector<int64_t> ids(size_t(rows * r.top_k));
    wl_set_threads(int32_t(run.between(1, 3)));
    CHECK(wl_route(logits.data(), rows, experts, &r, weights.data(), ids.data(), nullptr) == WL_OK, "refused");
    expect_scores(r, logits, rows, experts, weights, ids);
    for (int64_t row = 0; row < rows; row++) {
      const auto expected = expected_of(r, &logits[size_t(row * experts)], experts);
      for (int64_t a = 0; a < r.top_k; a++) {
        const size_t at = size_t(row * r.top_k + a);
        CHECK(ids[at] == expected[size_t(a)].first, "row %ld place %ld: %ld, expected %ld", long(row), long(a), long(ids[at]), long(expected[size_t(a)].first));
        CHECK(test::near(double(weights[at]), expected[size_t(a)].second, 3e-6 * std::abs(expected[size_t(a)].second)), "weight %g, expected %g", double(weights[at]), expected[size_t(a)].second);
      }
    }
    std::vector<float> alone(size_t(r.top_k));
    std::vector<int64_t> own(size_t(r.top_k));
    wl_route(&logits[size_t((rows - 1) * experts)], 1, experts, &r, alone.data(), own.data(), nullptr);
    CHECK(test::first_difference(alone.data(), &weights[size_t((rows - 1) * r.top_k)], r.top_k) < 0, "a row alone");
  }
  wl_set_threads(1);
}

TEST(numbers_that_are_none_find_experts_too) {
  for (int32_t score : {WL_SOFTMAX, WL_SIGMOID, WL_LOGITS})
    for (float value : {test::NOT_A_NUMBER, test::INF, -test::INF}) {
      std::vector<float> logits(19, value), weights(8, 0.0f);
      logits[3] = 1.0f;
      wl_routing r{};
      r.score = score, r.scale = 1, r.top_k = 8;
      std::vector<int64_t> ids(8, -1);
      CHECK(wl_route(logits.data(), 1, 19, &r, weights.data(), ids.data(), nullptr) == WL_OK, "refused");
      std::sort(ids.begin(), ids.end());
      CHECK(ids.front() >= 0 && ids.back() < 19 && std::adjacent_find(ids.begin(), ids.end()) == ids.end(), "ids");
    }
  wl_routing r{};
  r.top_k = 20;
  CHECK(wl_route(nullptr, 0, 19, &r, nullptr, nullptr, nullptr) == WL_E_ARGUMENT, "more than there are");
}

TEST(calls_of_a_list_do_what_calls_do) {
  const size_t width = 33;
  const std::vector<float> x = run.normals(int64_t(width)), weight = run.normals(int64_t(width));
  std::vector<float> normed(width), copied(width), expected(width);
  wl_call calls[2] = {};
  calls[0].function = WL_RUN_RMS_NORM;
  wl_argument *a = calls[0].arguments;
  a[0].p = x.data(), a[1].i = width, a[2].p = normed.data(), a[3].i = width, a[4].i = 1, a[5].i = width;
  a[6].p = weight.data(), a[7].i = WL_F32, a[8].f = 1, a[9].f = 1e-6;
  calls[1].function = WL_RUN_COPY_ROWS, calls[1].label = 1;
  a = calls[1].arguments;
  a[0].p = normed.data(), a[1].i = a[2].i = width, a[3].i = a[4].i = 1, a[5].i = width, a[6].p = copied.data(), a[7].i = a[8].i = width;
  double seconds[2] = {};
  CHECK(wl_run(calls, 2, seconds) == WL_OK, "refused");
  wl_rms_norm(x.data(), width, expected.data(), width, 1, width, weight.data(), WL_F32, 1, 1e-6f);
  CHECK(test::first_difference(copied.data(), expected.data(), int64_t(width)) < 0, "another result");
  CHECK(seconds[0] > 0 && seconds[1] > 0, "no time");
  calls[0].function = 99;
  CHECK(wl_run(calls, 2, seconds) == WL_E_ARGUMENT, "an unknown function");
}
