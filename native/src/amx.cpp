#define WL_NS wl_amx
#define WL_MR 16  // rows of a tile register
#include "amx.h"
#include "table.h"

// constinit: code of this file must not run before the processor has been asked
constinit const wl::Products wl::amx_products = {wl_amx::products<wl_amx::Tiles>, wl_amx::experts<wl_amx::Tiles>};
