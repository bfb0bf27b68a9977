#define WL_NS wl_avx512
#include "isa.h"

// constinit: code of this file must not run before the processor has been asked
constinit const wl::Table wl::avx512_table = wl_avx512::make_table();
