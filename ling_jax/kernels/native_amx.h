// Products of bfloat16 by the tiles of Intel's AMX, where this machine has them; for native.cc.

#pragma once

#include "native_vectors.h"

#if LING_LANES != 16 || defined(LING_NO_AMX)  // its vectors are a tile's rows; the tests want 16 lanes without it too
#elif defined(LING_AMX_EMULATED)              // by the tests: the same tiles in plain code
#include LING_AMX_EMULATED
#define LING_AMX 1
#elif defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define LING_AMX 1
#endif

#if defined(LING_AMX)
namespace {

constexpr Index kStep = 32;               // contracted elements of one tile product: 16 pairs
constexpr Index kTile = 16 * kStep;       // elements of a tile
constexpr Index kPackBytes = 256 * 1024;  // bytes of b at a time

// This process may use the tiles' registers. Linux gives them to those who ask.
bool amx_allowed() {
#if defined(LING_AMX_EMULATED)
  return true;
#else
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#endif
}

// All eight tiles are 16 rows of 64 bytes while this lives.
class UseTiles {
 public:
  UseTiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
  }
  ~UseTiles() { _tile_release(); }
};

// c [32, 32] = a b (+ c if `add`) over `steps` steps. a0, a1: upper and lower 16 rows, `lda` apart, a step every
// `a_step` elements; b0, b1: left and right 16 columns, packed, a tile a step.
void multiply_block(const Bf16* a0, const Bf16* a1, Index lda, Index a_step, const Bf16* b0, const Bf16* b1,
                    Index steps, float* c, Index ldc, bool add) {
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  float* low = c + 16 * ldc;
  if (add) {
    _tile_loadd(0, c, 4 * ldc);
    _tile_loadd(1, c + 16, 4 * ldc);
    _tile_loadd(2, low, 4 * ldc);
    _tile_loadd(3, low + 16, 4 * ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (Index i = 0; i < steps; ++i) {
    _tile_loadd(4, a0 + i * a_step, 2 * lda);
    _tile_loadd(6, b0 + i * kTile, 64);
    _tile_loadd(5, a1 + i * a_step, 2 * lda);
    _tile_loadd(7, b1 + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * ldc);
  _tile_stored(1, c + 16, 4 * ldc);
  _tile_stored(2, low, 4 * ldc);
  _tile_stored(3, low + 16, 4 * ldc);
  asm volatile("" ::: "memory");
}

// 16 elements as bfloat16, each in the upper half of a lane; zeros below.
inline Bits upper_halves(const Bf16* p, Index count) { return (Bits)load_part(p, count); }
inline Bits upper_halves(const float* p, Index count) { return rounded(load_part(p, count)) & 0xffff0000; }

// 32 consecutive elements as bfloat16, two to a lane.
inline Bits pairs(const Bf16* p, Index count) {
  Bits v = {};
  std::memcpy(&v, p, std::clamp<Index>(count, 0, kStep) * sizeof(Bf16));
  return v;
}
inline Bits pairs(const float* p, Index count) {
#if defined(__AVX512BF16__)
  return (Bits)_mm512_cvtne2ps_pbh((__m512)load_part(p + kLanes, count - kLanes), (__m512)load_part(p, count));
#else
  Bf16 both[kStep];
  store(both, load_part(p, count));
  store(both + kLanes, load_part(p + kLanes, count - kLanes));
  return pairs(both, kStep);
#endif
}

// w [depth, columns], rows `stride` apart, as tiles of two rows' pairs: b's form, or with kTransposed a's, for w^T.
template <bool kTransposed, typename W>
void pack_pairs(const W* w, Index stride, Index depth, Index columns, Bf16* to) {
  for (Index n = 0; n < ceil_div(columns, 32) * 32; n += 16) {
    for (Index k = 0; k < ceil_div(depth, kStep) * kStep; k += kStep, to += kTile) {
      Bits block[kLanes];
      for (Index i = 0; i < 16; ++i) {
        const Index row = k + 2 * i;
        const Bits even = upper_halves(w + row * stride + n, row < depth ? columns - n : 0);
        block[i] = even >> 16 | upper_halves(w + (row + 1) * stride + n, row + 1 < depth ? columns - n : 0);
      }
      if constexpr (kTransposed) transpose(block);
      std::memcpy(to, block, sizeof block);
    }
  }
}

// b's form of the transpose of w [columns, depth].
template <typename W>
void pack_pairs_across(const W* w, Index stride, Index depth, Index columns, Bf16* to) {
  for (Index n = 0; n < ceil_div(columns, 32) * 32; n += 16) {
    for (Index k = 0; k < depth; k += kStep, to += kTile) {
      Bits block[kLanes] = {};
      for (Index i = 0; i < std::min<Index>(16, columns - n); ++i) {
        block[i] = pairs(w + (n + i) * stride + k, depth - k);
      }
      transpose(block);
      std::memcpy(to, block, sizeof block);
    }
  }
}

template <typename W>
void product_amx(const Shape& s, const Bf16* x, const W* w, Bf16* y, Index rows, Index first, Index last) {
  const UseTiles use;
  const Index steps = ceil_div(s.inner, kStep), padded = steps * kStep;
  const Index width = std::max<Index>(32, kPackBytes / (2 * padded) / 32 * 32);
  float* c = scratch<float>(kC, 32 * 32);
  Bf16* part = scratch<Bf16>(kA, 32 * padded);
  for (Index n = first; n < last; n += width) {
    const Index columns = std::min(width, last - n);
    Bf16* b = scratch<Bf16>(kB, ceil_div(columns, 32) * 32 * padded);
    if (s.transposed) {
      pack_pairs_across(w + n * s.inner, s.inner, s.inner, columns, b);
    } else {
      pack_pairs<false>(w + n, s.outer, s.inner, columns, b);
    }
    for (Index m = 0; m < rows; m += 32) {
      const Index height = std::min<Index>(32, rows - m);
      const Bf16* a = x + m * s.inner;
      Index lda = s.inner;
      if (height < 32 || lda != padded) {  // no tile may end in another row's elements, whose NaN times 0 is NaN
        std::memset(part, 0, 32 * padded * sizeof(Bf16));
        for (Index r = 0; r < height; ++r) std::memcpy(part + r * padded, a + r * lda, lda * sizeof(Bf16));
        a = part;
        lda = padded;
      }
      for (Index j = 0; j < columns; j += 32) {
        const Bf16* left = b + j * padded;
        multiply_block(a, a + 16 * lda, lda, kStep, left, left + 16 * padded, steps, c, 32, false);
        for (Index r = 0; r < height; ++r) {
          Bf16* to = y + (m + r) * s.outer + n + j;
          store_part(to, load(c + 32 * r), columns - j);
          store_part(to + 16, load(c + 32 * r + 16), columns - j - 16);
        }
      }
    }
  }
}

void gradient_amx(const Bf16* g, Index stride, const Bf16* x, float* dw, Index rows, Index outputs, Index inputs,
                  Index first, Index last) {
  const UseTiles use;
  constexpr Index kDeep = 512;
  Bf16* a = scratch<Bf16>(kA, kWidth * kDeep);
  Bf16* b = scratch<Bf16>(kB, kWidth * kDeep);
  float* c = scratch<float>(kC, 32 * 32);
  const auto add_block = [&](Index steps, Index m, Index n, Index height, Index columns, float* to, bool add) {
    const Bf16 *upper = a + m * steps * kStep, *left = b + n * steps * kStep;
    const bool whole = height >= 32 && columns >= 32;
    multiply_block(upper, upper + steps * kTile, kStep, kTile, left, left + steps * kTile, steps, whole ? to : c,
                   whole ? inputs : 32, whole && add);
    for (Index r = 0; !whole && r < std::min<Index>(height, 32); ++r) {
      for (Index i = 0; i < 32; i += 16) {
        float* part = to + r * inputs + i;
        const Vec sum = load(c + r * 32 + i);
        store_part(part, add ? sum + load_part(part, columns - i) : sum, columns - i);
      }
    }
  };
  for (Index n = first; n < last; n += kWidth) {
    const Index columns = std::min(kWidth, last - n);
    for (Index m = 0; m < outputs; m += kWidth) {
      const Index height = std::min(kWidth, outputs - m);
      for (Index r = 0; r < rows; r += kDeep) {
        const Index depth = std::min(kDeep, rows - r), steps = ceil_div(depth, kStep);
        pack_pairs<true>(g + r * stride + m, stride, depth, height, a);
        pack_pairs<false>(x + r * inputs + n, inputs, depth, columns, b);
        for (Index i = 0; i < height; i += 32) {
          for (Index j = 0; j < columns; j += 32) {
            float* to = dw + (m + i) * inputs + n + j;
            add_block(steps, i, j, height - i, columns - j, to, r > 0);
          }
        }
      }
    }
  }
}
}  // namespace
#endif
