// Intel's AMX tiles in plain code, so that native_amx.h is tested on machines without them. Included by it with
// -DLING_AMX_EMULATED='"..."'; the names are the compiler's own intrinsics.

#pragma once

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC optimize("O2")  // the rest of the tests' build is hardly optimised

namespace amx_emulated {

struct Tile {
  std::uint32_t rows[16][16];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void check() {
  if (!configured) __builtin_trap();  // as the processor does
}
inline void load_config(const void* config) {
  const auto* bytes = static_cast<const std::uint8_t*>(config);
  for (int tile = 0; tile < 8; ++tile) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, 2);
    if (bytes[0] != 1 || row_bytes != 64 || bytes[48 + tile] != 16) __builtin_trap();
  }
  configured = true;
}
inline void zero(int tile) {
  check();
  tiles[tile] = Tile{};
}
inline void load(int tile, const void* from, std::int64_t stride) {
  check();
  for (int i = 0; i < 16; ++i) std::memcpy(tiles[tile].rows[i], static_cast<const char*>(from) + i * stride, 64);
}
inline void store(int tile, void* to, std::int64_t stride) {
  check();
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile].rows[i], 64);
}
inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void dot(int c, int a, int b) {
  check();
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      const std::uint32_t pair = tiles[a].rows[m][k];
      for (int n = 0; n < 16; ++n) {
        const std::uint32_t other = tiles[b].rows[k][n];
        float sum = as_float(tiles[c].rows[m][n]);
        sum += as_float(pair << 16) * as_float(other << 16);
        sum += as_float(pair & 0xffff0000) * as_float(other & 0xffff0000);
        std::memcpy(&tiles[c].rows[m][n], &sum, 4);
      }
    }
  }
}

}  // namespace amx_emulated

#pragma GCC pop_options

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulated::load_config
#define _tile_release() (amx_emulated::configured = false)
#define _tile_zero amx_emulated::zero
#define _tile_loadd amx_emulated::load
#define _tile_stored amx_emulated::store
#define _tile_dpbf16ps amx_emulated::dot
