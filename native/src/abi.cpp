// The C functions: which instruction set runs, and no exception that leaves.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "pool.h"
#include "table.h"

namespace {

struct Choice {
  const char *name;
  const wl::Table *table;
  const wl::Products *bf16;  // of bf16 activations
  bool (*runs)();
};

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}

/// Tile registers with bf16 products, and the system's leave to use them.
bool has_amx() {
  if (!has_avx512_bf16()) return false;
#if defined(WL_AMX_EMULATED)
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#endif
}

const Choice CHOICES[] = {
    {"avx2", &wl::avx2_table, &wl::avx2_table.bf16,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {"avx512", &wl::avx512_table, &wl::avx512_table.bf16,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx512_bf16", &wl::avx512_table, &wl::avx512_bf16_products, has_avx512_bf16},
    {"amx", &wl::avx512_table, &wl::amx_products, has_amx},
};

const Choice *best() {
  const Choice *found = nullptr;
  for (const Choice &choice : CHOICES)
    if (choice.runs()) found = &choice;
  return found;
}

const Choice *in_use = best();

template <typename F>
int32_t guarded(F call) {
  if (!in_use) return WL_E_ARGUMENT;
  try {
    call(*in_use->table);
    return WL_OK;
  } catch (const std::bad_alloc &) {
    return WL_E_MEMORY;
  }
}

const wl::Products &products_of(const wl::Table &t, int32_t precision) {
  return precision == WL_BF16_ACTIVATIONS ? *in_use->bf16 : t.exact;
}

template <typename T>
T argument(const wl_argument &a) {
  if constexpr (std::is_pointer_v<T>) return static_cast<T>(const_cast<void *>(a.p));
  else if constexpr (std::is_floating_point_v<T>) return T(a.f);
  else return T(a.i);
}

template <typename... Types>
int32_t call(int32_t (*function)(Types...), const wl_argument *arguments) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return function(argument<Types>(arguments[I])...);
  }(std::index_sequence_for<Types...>{});
}

int32_t run_one(const wl_call &one) {
  const wl_argument *a = one.arguments;
  switch (one.function) {
    case WL_RUN_PRODUCTS: return call(wl_products, a);
    case WL_RUN_EXPERTS: return call(wl_experts, a);
    case WL_RUN_ATTEND: return call(wl_attend, a);
    case WL_RUN_RMS_NORM: return call(wl_rms_norm, a);
    case WL_RUN_COMBINE: return call(wl_combine, a);
    case WL_RUN_ROTATE: return call(wl_rotate, a);
    case WL_RUN_WRITE_ROWS: return call(wl_write_rows, a);
    case WL_RUN_ROUTE: return call(wl_route, a);
    case WL_RUN_GROUP: return call(wl_group, a);
    case WL_RUN_ROUTED: return call(wl_routed, a);
    case WL_RUN_COPY_ROWS: return call(wl_copy_rows, a);
    case WL_RUN_GATE: return call(wl_gate, a);
  }
  return WL_E_ARGUMENT;
}

}  // namespace

extern "C" {

int32_t wl_abi_version(void) { return WL_ABI_VERSION; }

const char *wl_available(void) {
  static const std::string names = [] {
    std::string all;
    for (const Choice &choice : CHOICES)
      if (choice.runs()) all.append(all.empty() ? "" : ",").append(choice.name);
    return all;
  }();
  return names.c_str();
}

const char *wl_in_use(void) { return in_use ? in_use->name : ""; }

int32_t wl_use(const char *name) {
  for (const Choice &choice : CHOICES)
    if (!std::strcmp(choice.name, name) && choice.runs()) {
      in_use = &choice;
      return WL_OK;
    }
  return WL_E_ARGUMENT;
}

int32_t wl_set_threads(int32_t threads) {
  wl::set_threads(threads);
  return WL_OK;
}

int32_t wl_get_threads(void) { return wl::get_threads(); }

int32_t wl_products(const wl_product *products, int64_t num, int64_t num_rows, int32_t precision) {
  return guarded([&](const wl::Table &t) {
    products_of(t, precision).products(products, num, num_rows);
  });
}

int32_t wl_experts(const float *x, int64_t ldx, float *out, int64_t ldo, const wl_expert *experts, int64_t num,
                   int32_t activation, float alpha, float limit, int32_t precision) {
  return guarded([&](const wl::Table &t) {
    products_of(t, precision).experts(x, ldx, out, ldo, experts, num, activation, alpha, limit);
  });
}

int32_t wl_routed(const float *x, int64_t ldx, float *out, int64_t ldo, const wl_expert *const *table, int64_t num,
                  const int64_t *counts, const int64_t *rows, const int64_t *places, int32_t activation, float alpha,
                  float limit, int32_t precision) {
  return guarded([&](const wl::Table &t) {
    std::vector<wl_expert> experts;
    for (int64_t e = 0; e < num; rows += counts[e], places += counts[e], e++) {
      if (!table[e] || !counts[e]) continue;
      wl_expert &one = experts.emplace_back(*table[e]);
      one.rows = rows, one.places = places, one.num_rows = counts[e];
    }
    if (!experts.empty())
      products_of(t, precision).experts(x, ldx, out, ldo, experts.data(), int64_t(experts.size()), activation, alpha, limit);
  });
}

int32_t wl_attend(const wl_attention *work) {
  return guarded([&](const wl::Table &t) { t.attend(*work); });
}

int32_t wl_rms_norm(const float *x, int64_t ldx, float *y, int64_t ldy, int64_t num_rows, int64_t width,
                    const void *weight, int32_t weight_type, float add, float eps) {
  return guarded([&](const wl::Table &t) { t.rms_norm(x, ldx, y, ldy, num_rows, width, weight, weight_type, add, eps); });
}

int32_t wl_combine(const float *outputs, const float *weights, const float *shared, const float *residual, float *out,
                   int64_t num_rows, int64_t per_row, int64_t width, float multiplier) {
  return guarded([&](const wl::Table &t) {
    t.combine(outputs, weights, shared, residual, out, num_rows, per_row, width, multiplier);
  });
}

int32_t wl_rotate(float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows, int64_t num_heads, int64_t pairs,
                  const float *cos, const float *sin, int64_t table_stride, int32_t interleaved) {
  return guarded([&](const wl::Table &t) {
    t.rotate(x, row_stride, head_stride, num_rows, num_heads, pairs, cos, sin, table_stride, interleaved);
  });
}

int32_t wl_write_rows(const float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows, int64_t num_heads,
                      int64_t width, const wl_cache *cache, const int64_t *pages, const int64_t *offsets, int64_t page_tokens) {
  if (cache->type == WL_INT8 && !cache->scales) return WL_E_ARGUMENT;
  return guarded([&](const wl::Table &t) {
    t.write_rows(x, row_stride, head_stride, num_rows, num_heads, width, *cache, pages, offsets, page_tokens);
  });
}

int32_t wl_copy_rows(const float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows, int64_t num_heads,
                     int64_t width, float *out, int64_t out_row_stride, int64_t out_head_stride) {
  return guarded([&](const wl::Table &t) {
    t.copy_rows(x, row_stride, head_stride, num_rows, num_heads, width, out, out_row_stride, out_head_stride);
  });
}

int32_t wl_gate(float *x, int64_t num_rows, int64_t width, const float *gate, int32_t one_of_row) {
  return guarded([&](const wl::Table &t) { t.gate(x, num_rows, width, gate, one_of_row); });
}

int32_t wl_group(const int64_t *ids, int64_t num, int64_t per_row, int64_t num_experts, int64_t *order, int64_t *rows,
                 int64_t *counts) {
  return guarded([&](const wl::Table &) {
    std::vector<int64_t> next(size_t(num_experts) + 1, 0);
    for (int64_t i = 0; i < num; i++) next[size_t(ids[i]) + 1]++;
    for (size_t e = 0; e < size_t(num_experts); e++) {
      counts[e] = next[e + 1];
      next[e + 1] += next[e];
    }
    for (int64_t i = 0; i < num; i++) {
      const int64_t at = next[size_t(ids[i])]++;
      order[at] = i;
      rows[at] = i / per_row;
    }
  });
}

int32_t wl_route(const float *logits, int64_t num_rows, int64_t num_experts, const wl_routing *routing, float *weights,
                 int64_t *ids, float *scores) {
  const bool is_whole = !routing->num_groups || num_experts % routing->num_groups == 0;
  if (routing->top_k < 1 || routing->top_k > num_experts || !is_whole) return WL_E_ARGUMENT;
  return guarded([&](const wl::Table &t) { t.route(logits, num_rows, num_experts, *routing, weights, ids, scores); });
}

int32_t wl_run(const wl_call *calls, int64_t num, double *seconds) {
  auto before = std::chrono::steady_clock::now();
  for (const wl_call *one = calls; one < calls + num; one++) {
    if (const int32_t code = run_one(*one)) return code;
    const auto now = std::chrono::steady_clock::now();
    seconds[one->label] += std::chrono::duration<double>(now - before).count();
    before = now;
  }
  return WL_OK;
}

int32_t wl_read(const void *data, int64_t num_bytes, float *sum) {
  return guarded([&](const wl::Table &t) { *sum = t.read(static_cast<const uint8_t *>(data), num_bytes); });
}

int32_t wl_widen(const wl_matrix *w, float *out) {
  return guarded([&](const wl::Table &t) { t.widen(*w, out); });
}
}
