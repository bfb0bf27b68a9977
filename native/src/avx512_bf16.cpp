#define WL_NS wl_avx512_bf16
#include "isa.h"

// constinit: code of this file must not run before the processor has been asked
constinit const wl::Table wl::avx512_bf16_table = wl_avx512_bf16::make_table();
