// Elements of stored matrices, bit for bit.
#include "matrices.h"

namespace {

void expect_widened(const test::Stored &s) {
  std::vector<float> out(size_t(s.m.n * s.m.k));
  const std::vector<float> expected = s.all();
  CHECK(wl_widen(&s.m, out.data()) == WL_OK, "%s", test::name_of(s.storage));
  const int64_t at = test::first_difference(out.data(), expected.data(), int64_t(out.size()));
  if (at < 0) return;
  CHECK(at < 0, "%s (%ld, %ld) at (%ld, %ld): %a, expected %a", test::name_of(s.storage), long(s.m.n), long(s.m.k),
        long(at / s.m.k), long(at % s.m.k), double(out[size_t(at)]), double(expected[size_t(at)]));
}

}  // namespace

TEST(every_storage_widens_exactly) {
  for (int i = 0; i < run.tries(24); i++)
    for (const test::Storage &storage : test::all_storages(run)) {
      const test::Stored s(run, storage, run.size(i % 8 ? 70 : 300), run.size(i % 8 ? 300 : 700));
      expect_widened(s);
    }
}

TEST(every_bit_pattern_of_codes_and_scales_widens_exactly) {
  for (int i = 0; i < run.tries(8); i++)
    for (test::Storage storage : test::all_storages(run)) {
      storage.any_bits = true;
      expect_widened(test::Stored(run, storage, run.size(40), run.size(530)));
    }
  for (int32_t code : {WL_BF16, WL_F16}) {  // all 65536
    test::Stored s(run, {.code = code, .packing = WL_ROWS}, 256, 256);
    for (size_t i = 0; i < 65536; i++) {
      uint8_t *to = s.codes.data() + (static_cast<const uint8_t *>(s.m.codes) - s.codes.data());
      const uint16_t bits = uint16_t(i);
      std::memcpy(to + i / 256 * size_t(s.m.stride_n) + i % 256 * 2, &bits, 2);
    }
    expect_widened(s);
  }
}
