#define WL_NS wl_avx512_bf16
#include "pair_rows.h"
#include "table.h"

// constinit: code of this file must not run before the processor has been asked
constinit const wl::Products wl::avx512_bf16_products = {wl_avx512_bf16::products<wl_avx512_bf16::FewPairs>,
                                                         wl_avx512_bf16::experts<wl_avx512_bf16::FewPairs>};
