#define WL_NS wl_avx512
#include "isa.h"

const wl::Table wl::avx512_table = wl_avx512::make_table();
