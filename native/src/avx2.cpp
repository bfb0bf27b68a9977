#define WL_NS wl_avx2
#include "isa.h"

// constinit: code of this file must not run before the processor has been asked
constinit const wl::Table wl::avx2_table = wl_avx2::make_table();
