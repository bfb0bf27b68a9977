// Which experts a row goes to, from its router's logits.
#pragma once

#include <vector>

#include "rows.h"

namespace WL_NS {

struct RouteWork {
  const float *logits;
  int64_t num_rows, num_experts;
  const wl_routing &routing;
  float *weights;
  int64_t *ids;
  float *scores;  // null, or of all experts
};

/// Whether a is chosen before b; NaN is before all, so that it shows.
inline bool is_before(float a, float b) { return a > b || (a != a && b == b); }

/// Indices of the first `count` in order, of equal ones the lower first.
inline void first_of(const float *x, int64_t size, int64_t count, int64_t *found) {
  int64_t held = 0;
  for (int64_t i = 0; i < size; i++) {
    if (held == count && !is_before(x[i], x[found[count - 1]])) continue;
    int64_t at = held < count ? held++ : count - 1;
    for (; at && is_before(x[i], x[found[at - 1]]); at--) found[at] = found[at - 1];
    found[at] = i;
  }
}

/// e to each of `size` elements less the largest -> their sum. `x` has room for whole vectors.
inline float exponentials(float *x, int64_t size) {
  const int64_t whole = (size + W - 1) / W * W;
  std::fill(x + size, x + whole, -INFINITY);
  V top = v_set(-INFINITY), sum = v_zero();
  for (int64_t i = 0; i < whole; i += W) top = v_max(v_load(x + i), top);
  top = v_set(v_top(top));
  for (int64_t i = 0; i < whole; i += W) {
    const V e = v_exp(v_sub(v_load(x + i), top));
    v_store(x + i, e);
    sum = v_add(sum, e);
  }
  return v_sum(sum);
}

inline void scores_of(float *x, int64_t size, int32_t kind) {
  if (kind == WL_LOGITS) return;
  if (kind == WL_SOFTMAX) {
    const float sum = exponentials(x, size);
    for (int64_t i = 0; i < size; i += W) v_store(x + i, v_div(v_load(x + i), v_set(sum)));
    return;
  }
  for (int64_t i = 0; i < size; i += W) v_store(x + i, v_sigmoid(v_load(x + i)));
}

/// Experts of groups that are not among the best can no longer be chosen.
inline void drop_groups(float *choice, int64_t size, const wl_routing &r) {
  const int64_t each = size / r.num_groups;
  std::vector<float> rank(static_cast<size_t>(r.num_groups));
  std::vector<int64_t> kept(static_cast<size_t>(r.kept_groups));
  std::vector<bool> is_kept(static_cast<size_t>(r.num_groups));
  for (int64_t g = 0; g < r.num_groups; g++) {
    int64_t best[2] = {0, 0};
    const float *group = choice + g * each;
    first_of(group, each, std::min<int64_t>(2, each), best);
    rank[size_t(g)] = r.rank_by_two && each > 1 ? group[best[0]] + group[best[1]] : group[best[0]];
  }
  first_of(rank.data(), r.num_groups, r.kept_groups, kept.data());
  for (int64_t g : kept) is_kept[size_t(g)] = true;
  for (int64_t g = 0; g < r.num_groups; g++)
    if (!is_kept[size_t(g)]) std::fill_n(choice + g * each, each, -INFINITY);
}

inline float size_of_kept(const float *kept, const wl_routing &r) {
  float sum = 0;
  for (int64_t i = 0; i < r.top_k; i++) sum += r.norm == WL_N_EUCLID ? kept[i] * kept[i] : kept[i];
  if (r.norm == WL_N_PLUS) return sum + r.norm_by;
  const float size = r.norm == WL_N_EUCLID ? std::sqrt(sum) : sum;
  return size < r.norm_by ? r.norm_by : size;
}

inline void route_row(const RouteWork &work, int64_t row) {
  const wl_routing &r = work.routing;
  const int64_t size = work.num_experts, whole = (size + W - 1) / W * W;
  thread_local std::vector<float> memory;
  memory.resize(static_cast<size_t>(2 * whole + r.top_k + W));
  float *scores = memory.data(), *choice = scores + whole, *kept = choice + whole;
  int64_t *ids = work.ids + row * r.top_k;
  std::copy_n(work.logits + row * size, size, scores);
  std::fill(scores + size, scores + whole, 0.0f);
  scores_of(scores, size, r.score);
  if (work.scores) std::copy_n(scores, size, work.scores + row * size);
  for (int64_t i = 0; i < size; i++) choice[i] = r.bias ? scores[i] + r.bias[i] : scores[i];
  if (r.num_groups) drop_groups(choice, size, r);
  first_of(choice, size, r.top_k, ids);
  for (int64_t i = 0; i < r.top_k; i++) kept[i] = scores[ids[i]];
  float divisor = 1;
  if (r.score == WL_LOGITS) divisor = exponentials(kept, r.top_k);
  else if (r.norm != WL_N_NONE) divisor = size_of_kept(kept, r);
  float *weights = work.weights + row * r.top_k;
  for (int64_t i = 0; i < r.top_k; i++) weights[i] = kept[i] / divisor * r.scale * (r.factors ? r.factors[ids[i]] : 1.0f);
}

inline void route(const RouteWork &work) { for_rows<route_row>(work, work.num_experts * 4); }

}  // namespace WL_NS
