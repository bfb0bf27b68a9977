#define WL_NS wl_avx512_bf16
#include "isa.h"

const wl::Table wl::avx512_bf16_table = wl_avx512_bf16::make_table();
