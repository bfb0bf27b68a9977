#include "matrices.h"

#include <algorithm>

namespace test {

namespace {

constexpr int AWQ[8] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr int64_t WHOLE = int64_t(1) << 40;

bool is_float(int code) { return code == WL_F32 || code == WL_BF16 || code == WL_F16; }
bool is_nibble(int code) { return code == WL_E2M1 || code == WL_INT4; }
int64_t bytes_of(int code) { return code == WL_F32 ? 4 : code == WL_BF16 || code == WL_F16 ? 2 : 1; }
int32_t half_of(int32_t scale) { return scale == WL_S_BF16 ? WL_BF16 : WL_F16; }
int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

template <typename T>
T read(const void *from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

/// 2 to the `exponent`, as float.
float power(int exponent) {
  const uint32_t bits = exponent < -126 ? 1u << (exponent + 149) : uint32_t(exponent + 127) << 23;
  return read<float>(&bits);
}

float from_e4m3(int bits) {
  const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return NOT_A_NUMBER;
  const float size = exponent ? (1.0f + float(mantissa) / 8.0f) * power(exponent - 7) : float(mantissa) * power(-9);
  return bits & 0x80 ? -size : size;
}

float from_f16(int bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NOT_A_NUMBER : INF)
                   : exponent ? float(1024 + mantissa) * power(exponent - 25) : float(mantissa) * power(-24);
  return bits & 0x8000 ? -size : size;
}

float from_e2m1(int bits) {
  const int exponent = (bits >> 1) & 3, mantissa = bits & 1;
  const float size = exponent ? (1.0f + 0.5f * float(mantissa)) * power(exponent - 1) : 0.5f * float(mantissa);
  return bits & 8 ? -size : size;
}

}  // namespace

uint16_t usual_bits(Run &run, int32_t code, int exponent) {
  const uint32_t random = run.bits();
  const int mantissa_bits = code == WL_BF16 ? 7 : 10, bias = code == WL_BF16 ? 127 : 15;
  const uint32_t field = uint32_t(bias + exponent) + (random >> 16) % 3;
  return uint16_t((random & 0x8000) | field << mantissa_bits | (random & ((1u << mantissa_bits) - 1)));
}

float from_bits(int32_t code, uint16_t bits) {
  if (code == WL_BF16) {
    const uint32_t wide = uint32_t(bits) << 16;
    return read<float>(&wide);
  }
  static const std::vector<float> all = [] {
    std::vector<float> table(65536);
    for (int i = 0; i < 65536; i++) table[size_t(i)] = from_f16(i);
    return table;
  }();
  return all[bits];
}

float Stored::element(int64_t n, int64_t k) const {
  uint32_t bits = 0;
  const uint8_t *base = static_cast<const uint8_t *>(m.codes);
  switch (m.packing) {
    case WL_ROWS:
      if (is_nibble(m.code)) {
        bits = uint32_t(base[n * m.stride_n + k / 2] >> (4 * (k % 2))) & 15;
      } else {
        std::memcpy(&bits, base + n * m.stride_n + k * m.stride_k, size_t(bytes_of(m.code)));
      }
      break;
    case WL_GPTQ: bits = read<uint32_t>(base + k / 8 * m.stride_k + 4 * n) >> (4 * (k % 8)) & 15; break;
    case WL_GPTQ8: bits = read<uint32_t>(base + k / 4 * m.stride_k + 4 * n) >> (8 * (k % 4)) & 255; break;
    case WL_AWQ: bits = read<uint32_t>(base + k * m.stride_k + n / 8 * 4) >> (4 * AWQ[n % 8]) & 15; break;
  }
  float value = 0;
  switch (m.code) {
    case WL_F32: return read<float>(&bits);
    case WL_BF16: case WL_F16: return from_bits(m.code, uint16_t(bits));
    case WL_E4M3: value = from_e4m3(int(bits)); break;
    case WL_E2M1: value = from_e2m1(int(bits)); break;
    default: value = float(bits);
  }
  const int64_t row = n / m.block_n, group = m.groups ? m.groups[k] : k / m.block_k;
  const int per = m.code == WL_INT8 ? 4 : 8, width = 32 / per;
  float zero = m.code == WL_INT4 ? 8.0f : m.code == WL_INT8 ? 128.0f : 0.0f;
  const uint32_t mask = (1u << width) - 1;
  switch (m.zero_type) {
    case WL_Z_ROWS: zero = float(zeros[size_t(row / per * m.zero_stride + group)] >> (width * (row % per)) & mask); break;
    case WL_Z_GPTQ:
      zero = float(((zeros[size_t(group * m.zero_stride + row / per)] >> (width * (row % per))) + uint32_t(m.zero_add)) & mask);
      break;
    case WL_Z_AWQ: zero = float(zeros[size_t(group * m.zero_stride + row / 8)] >> (4 * AWQ[row % 8]) & 15); break;
  }
  const int64_t at = row * m.scale_stride_n + group * m.scale_stride_k;
  float scale = 1.0f;
  switch (m.scale_type) {
    case WL_S_F32: scale = read<float>(scales.data() + 4 * at); break;
    case WL_S_BF16: case WL_S_F16: scale = from_bits(half_of(m.scale_type), read<uint16_t>(scales.data() + 2 * at)); break;
    case WL_S_E8M0: scale = scales[size_t(at)] == 255 ? NOT_A_NUMBER : power(scales[size_t(at)] - 127); break;
  }
  return (value - zero) * scale;
}

std::vector<float> Stored::all() const {
  std::vector<float> w(size_t(m.n * m.k));
  for (int64_t n = 0; n < m.n; n++)
    for (int64_t k = 0; k < m.k; k++) w[size_t(n * m.k + k)] = element(n, k);
  return w;
}

namespace {

/// Places the codes: strides, size, and a start that is aligned to nothing but the element.
void place_codes(Stored &s, Run &run) {
  wl_matrix &m = s.m;
  const int64_t item = bytes_of(m.code), pad = run.pick<int64_t>({0, 0, 4, 12});
  int64_t size = 0, start = item * run.between(0, 3);
  if (m.packing == WL_ROWS && is_nibble(m.code)) {
    m.stride_n = (m.k + 1) / 2 + pad;
    size = (m.n - 1) * m.stride_n + (m.k + 1) / 2;
  } else if (m.packing == WL_ROWS) {
    switch (s.storage.layout) {
      case Storage::ROWS: m.stride_k = item, m.stride_n = m.k * item + pad; break;
      case Storage::TRANSPOSED: m.stride_n = item, m.stride_k = m.n * item + pad; break;
      case Storage::INTERLEAVED: m.stride_n = 2 * item, m.stride_k = 2 * m.n * item; break;
      case Storage::STRIDED: m.stride_k = 3 * item, m.stride_n = 3 * m.k * item + pad; break;
    }
    size = (m.n - 1) * m.stride_n + (m.k - 1) * m.stride_k + item;
  } else {
    start = 4 * run.between(0, 3);
    const int64_t words = m.packing == WL_AWQ ? blocks(m.n, 8) : m.n;
    const int64_t rows = m.packing == WL_AWQ ? m.k : blocks(m.k, m.packing == WL_GPTQ8 ? 4 : 8);
    m.stride_k = 4 * words + pad;
    size = (rows - 1) * m.stride_k + 4 * words;
  }
  s.codes.assign(size_t(start + size), 0);
  m.codes = s.codes.data() + start;
  for (uint8_t &byte : s.codes) byte = uint8_t(run.bits());
  if (s.storage.any_bits) return;
  if (m.code == WL_E4M3)
    for (uint8_t &byte : s.codes) byte = (byte & 0x7f) == 0x7f ? uint8_t(byte - 1) : byte;
  for (int64_t i = 0; is_float(m.code) && i < int64_t(s.codes.size()) / item; i++) {
    const float x = run.normal();
    const uint16_t half = usual_bits(run, m.code, -2);
    std::memcpy(s.codes.data() + i * item, item == 4 ? static_cast<const void *>(&x) : &half, size_t(item));
  }
}

void place_scales(Stored &s, Run &run) {
  wl_matrix &m = s.m;
  const int64_t across = blocks(m.n, m.block_n), down = blocks(m.k, m.block_k);
  const int64_t item = m.scale_type == WL_S_F32 ? 4 : m.scale_type == WL_S_E8M0 ? 1 : 2;
  const bool by_group = run.chance(0.5);
  m.scale_stride_n = by_group ? 1 : down;
  m.scale_stride_k = by_group ? across : 1;
  s.scales.resize(size_t(across * down * item));
  for (int64_t i = 0; i < across * down; i++) {
    const float x = (0.5f + float(run.bits() % 1024) / 1024.0f) * (run.chance(0.1) ? -0.01f : 0.01f);
    const uint32_t any = run.bits();
    const uint16_t half = usual_bits(run, half_of(m.scale_type), -8);
    const uint8_t exponent = uint8_t(run.between(115, 125));
    const void *usual = item == 4 ? static_cast<const void *>(&x) : item == 2 ? static_cast<const void *>(&half) : &exponent;
    std::memcpy(s.scales.data() + i * item, s.storage.any_bits ? &any : usual, size_t(item));
  }
  m.scales = s.scales.data();
}

void place_zeros(Stored &s, Run &run) {
  wl_matrix &m = s.m;
  const int64_t across = blocks(m.n, m.block_n), down = blocks(m.k, m.block_k);
  const int64_t words = blocks(across, m.code == WL_INT8 ? 4 : 8), pad = run.between(0, 2);
  const bool is_rows = m.zero_type == WL_Z_ROWS;
  m.zero_stride = (is_rows ? down : words) + pad;
  s.zeros.resize(size_t(((is_rows ? words : down) - 1) * m.zero_stride + (is_rows ? down : words)));
  for (uint32_t &word : s.zeros) word = run.bits();
  m.zeros = s.zeros.data();
  m.zero_add = m.zero_type == WL_Z_GPTQ && run.chance(0.5);
}

}  // namespace

Stored::Stored(Run &run, const Storage &how, int64_t n, int64_t k) : storage(how) {
  m.code = how.code, m.packing = how.packing, m.scale_type = how.scale, m.zero_type = how.zero;
  m.n = n, m.k = k;
  m.block_n = how.block_n, m.block_k = how.block_k;
  place_codes(*this, run);
  if (m.scale_type != WL_S_NONE) place_scales(*this, run);
  if (m.zero_type != WL_Z_NONE) place_zeros(*this, run);
  if (how.grouped) {
    groups.resize(size_t(k));
    for (int32_t &group : groups) group = int32_t(run.between(0, blocks(k, m.block_k) - 1));
    m.groups = groups.data();
  }
}

std::vector<Storage> all_storages(Run &run) {
  std::vector<Storage> all;
  const auto scale = [&] { return run.pick<int32_t>({WL_S_F32, WL_S_BF16, WL_S_F16, WL_S_E8M0}); };
  const auto block = [&] { return run.pick<int64_t>({8, 16, 32, 64, 128, 256, 1024, WHOLE}); };
  for (int32_t code : {WL_F32, WL_BF16, WL_F16})
    for (auto layout : {Storage::ROWS, Storage::TRANSPOSED, Storage::INTERLEAVED, Storage::STRIDED})
      all.push_back({.code = code, .packing = WL_ROWS, .layout = layout});
  for (int32_t code : {WL_E4M3, WL_INT8}) {
    for (auto layout : {Storage::ROWS, Storage::TRANSPOSED, Storage::INTERLEAVED, Storage::STRIDED})
      for (int64_t rows : {int64_t(1), int64_t(3), int64_t(128), WHOLE})
        all.push_back({.code = code, .packing = WL_ROWS, .scale = scale(), .layout = layout, .block_n = rows, .block_k = block()});
  }
  for (int32_t code : {WL_E2M1, WL_INT4})
    for (int64_t rows : {int64_t(1), int64_t(5), WHOLE})
      all.push_back({.code = code, .packing = WL_ROWS, .scale = scale(), .block_n = rows, .block_k = block()});
  for (int32_t code : {WL_INT4, WL_INT8}) {
    all.push_back({.code = code, .packing = WL_ROWS, .scale = scale(), .zero = WL_Z_ROWS, .block_k = block()});
    all.push_back({.code = code, .packing = WL_ROWS, .scale = scale(), .zero = WL_Z_ROWS, .block_k = block(), .grouped = true});
    all.push_back({.code = code, .packing = WL_ROWS, .scale = scale(), .block_k = block(), .grouped = true});
  }
  for (int32_t packing : {WL_GPTQ, WL_GPTQ8}) {
    const int32_t code = packing == WL_GPTQ ? WL_INT4 : WL_INT8;
    for (bool grouped : {false, true}) {
      all.push_back({.code = code, .packing = packing, .scale = scale(), .zero = WL_Z_GPTQ, .block_k = block(), .grouped = grouped});
      all.push_back({.code = code, .packing = packing, .scale = scale(), .block_k = block(), .grouped = grouped});
    }
  }
  all.push_back({.code = WL_INT4, .packing = WL_AWQ, .scale = scale(), .zero = WL_Z_AWQ, .block_k = block()});
  all.push_back({.code = WL_INT4, .packing = WL_AWQ, .scale = scale(), .block_k = block()});
  return all;
}

Storage any_storage(Run &run) {
  const std::vector<Storage> all = all_storages(run);
  return all[size_t(run.between(0, int64_t(all.size()) - 1))];
}

const char *name_of(const Storage &s) {
  static const char *codes[] = {"f32", "bf16", "f16", "e4m3", "e2m1", "int8", "int4"};
  static const char *packings[] = {"rows", "gptq", "awq", "gptq8"};
  static thread_local char name[160];
  std::snprintf(name, sizeof name, "%s %s layout %d scale %d zero %d block %ld x %ld%s", codes[s.code], packings[s.packing],
                int(s.layout), s.scale, s.zero, long(std::min(s.block_n, WHOLE)), long(s.block_k), s.grouped ? " grouped" : "");
  return name;
}

namespace {

float round_bf16(float x) {
  if (std::isnan(x)) return x;
  uint32_t bits = read<uint32_t>(&x);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  return read<float>(&bits);
}

}  // namespace

void multiply(const float *x, const Stored &stored, int32_t precision, const float *bias, double *out, double *bounds) {
  const int64_t n = stored.m.n, k = stored.m.k;
  std::vector<float> w = stored.all(), row(x, x + k);
  const bool is_rounded = precision == WL_BF16_ACTIVATIONS, is_paired =
      is_rounded && (!std::strcmp(wl_in_use(), "avx512_bf16") || !std::strcmp(wl_in_use(), "amx"));
  for (float &one : row) one = is_rounded ? round_bf16(one) : one;
  for (float &one : w) one = is_paired ? round_bf16(one) : one;
  for (int64_t i = 0; i < n; i++) {
    double sum = 0, size = 0, flushed = 0;
    for (int64_t j = 0; j < k; j++) {
      const double a = double(row[size_t(j)]), b = double(w[size_t(i * k + j)]);
      sum += a * b;
      size += std::fabs(a * b);
      flushed += std::fabs(a) + std::fabs(b) + 1;
    }
    if (bias) sum += double(bias[i]), size += std::fabs(double(bias[i]));
    out[i] = sum;
    // k additions, each off by half a unit of a partial sum that is at most `size`; products of
    // pairs take denormals for zeros
    bounds[i] = double(k + 2) * std::ldexp(size, -24) + std::ldexp(double(k + 2), -149) + (is_paired ? std::ldexp(flushed, -126) : 0);
  }
}

}  // namespace test
