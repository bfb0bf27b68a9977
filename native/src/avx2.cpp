#define WL_NS wl_avx2
#include "isa.h"

const wl::Table wl::avx2_table = wl_avx2::make_table();
