// Vectors of float32 as the compiler's own extension spells them, bfloat16 in them, and scratch memory; for native.cc.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(LING_LANES)  // by the tests: wider vectors than this machine has
#elif defined(__AVX512F__)
#define LING_LANES 16
#elif defined(__AVX__)
#define LING_LANES 8
#else
#define LING_LANES 4
#endif

namespace {

using Index = std::int64_t;
using Bf16 = std::uint16_t;

constexpr int kLanes = LING_LANES;
constexpr Index kWidth = 256;  // columns packed at a time

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// The upper halves hold the nearest bfloat16 (ties to even; NaN stays NaN), the lower ones garbage.
inline Bits rounded(Vec v) {
  const Bits bits = (Bits)v;
  return v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const Bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(Bf16* p, Vec v) {
#if defined(__AVX512BF16__) && LING_LANES == 16
  const auto h = _mm512_cvtneps_pbh((__m512)v);
#else
  const Halves h = __builtin_convertvector(rounded(v) >> 16, Halves);
#endif
  std::memcpy(p, &h, sizeof h);
}

// Stores past the caches, for what is not read soon: half the traffic of a store, which reads the line first. `p` must
// lie on a vector's boundary, and other threads see nothing of it before `end_stream`.
#if defined(__AVX512F__) && LING_LANES == 16
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
inline void end_stream() { _mm_sfence(); }
#elif defined(__AVX__) && LING_LANES == 8
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
inline void end_stream() { _mm_sfence(); }
#else
inline void stream(float* p, Vec v) { store(p, v); }
inline void end_stream() {}
#endif
inline bool can_stream(const float* p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(Vec) == 0; }

// The first `count` elements; zeros after them, which are never read.
template <typename T>
inline Vec load_part(const T* p, Index count) {
  if (count >= kLanes) return load(p);
  T part[kLanes] = {};
  if (count > 0) std::memcpy(part, p, count * sizeof(T));
  return load(part);
}
template <typename T>
inline void store_part(T* p, Vec v, Index count) {
  if (count >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  if (count > 0) std::memcpy(p, part, count * sizeof(T));
}

// As load_part, of a weight that meets rows of type X.
template <typename X, typename W>
inline Vec load_cast(const W* p, Index count) {
  const Vec v = load_part(p, count);
  if constexpr (std::is_same_v<X, Bf16> && std::is_same_v<W, float>) return (Vec)(rounded(v) & 0xffff0000);
  return v;
}

// Swaps the off-diagonal blocks of width D in a pair of rows: after D = 1, 2, 4 ..., columns are rows.
template <int D, typename V, int... J>
inline void swap_blocks(V& a, V& b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  const V low = __builtin_shufflevector(a, b, (J & D ? kLanes + J - D : J)...);
  b = __builtin_shufflevector(a, b, (J & D ? kLanes + J : J + D)...);
#else
  const V low = __builtin_shuffle(a, b, Bits{(J & D ? kLanes + J - D : J)...});
  b = __builtin_shuffle(a, b, Bits{(J & D ? kLanes + J : J + D)...});
#endif
  a = low;
}
template <int D = 1, typename V>
inline void transpose(V (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & D)) swap_blocks<D>(rows[i], rows[i + D], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (2 * D < kLanes) transpose<2 * D>(rows);
}

// Lane i: the sum of rows[i]'s lanes. Of two vectors at a time, which become one. Overwrites rows.
template <int D = 1>
inline Vec sums_of_lanes(Vec (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / (2 * D); ++i) {
    Vec a = rows[2 * i], b = rows[2 * i + 1];
    swap_blocks<D>(a, b, std::make_integer_sequence<int, kLanes>());
    rows[i] = a + b;
  }
  if constexpr (2 * D < kLanes) return sums_of_lanes<2 * D>(rows);
  return rows[0];
}

struct alignas(64) Line {
  char bytes[64];
};
enum Slot { kA, kB, kC, kRowsOf, kInner, kOther, kWide, kSlots };

// At least `count` elements for this thread, kept from call to call.
template <typename T>
T* scratch(Slot slot, Index count) {
  thread_local std::array<std::vector<Line>, kSlots> slots;
  const std::size_t lines = count * sizeof(T) / sizeof(Line) + 2;
  if (slots[slot].size() < lines) slots[slot] = std::vector<Line>(lines);
  return reinterpret_cast<T*>(slots[slot].data());
}

struct Shape {
  Index inner, outer;  // K and N
  bool transposed;     // w is [N, K]
};

}  // namespace
