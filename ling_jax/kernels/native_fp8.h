// Products of few rows with weights that lie as FP8 blocks, for decoding; for native.cc, of whose items it is made.
//
// Some rows of codes at a time are multiplied out into memory that stays in cache: what is read from far is the codes.

#pragma once

namespace {

using Code = std::uint8_t;  // e4m3: sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinity
typedef Code Codes __attribute__((vector_size(kLanes)));
constexpr Index kBlock = 128;
typedef std::int32_t Numbers __attribute__((vector_size(4 * kLanes)));

inline Bits widened(const Code* p) {
#if defined(__AVX512F__) && LING_LANES == 16
  return (Bits)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__) && LING_LANES == 8
  return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Codes codes;
  std::memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(codes, Bits);  // which GCC makes of single elements
#endif
}

inline Vec decoded(const Code* p) {
  const Bits bits = widened(p), size = bits & 0x7f;
  const Bits normal = (size << 20) + (120u << 23);                                   // from a bias of 7 to one of 127
  const Bits small = (Bits)(__builtin_convertvector((Numbers)size, Vec) * 0x1p-9f);  // eighths of 2^-6
  Bits value = (Numbers)size < 8 ? small : normal;
  value = size == 0x7f ? Bits{} + 0x7fc00000u : value;
  return (Vec)(value | (bits & 0x80) << 24);
}

// One group's weight [O, I]: codes, and a scale for each 128 x 128 of them or fewer at the edges.
struct Blocks {
  const Code* codes;
  const float* scales;
};

// `count` rows of it from row n on.
void multiply_out(const Blocks& w, Index inner, Index n, Index count, float* to) {
  const Index across = ceil_div(inner, kBlock);
  for (Index r = n; r < n + count; ++r, to += inner) {
    const Code* codes = w.codes + r * inner;
    for (Index k = 0; k < inner; k += kBlock) {
      const float scale = w.scales[r / kBlock * across + k / kBlock];
      const Index end = std::min(inner, k + kBlock);
      Index i = k;
      for (; i + kLanes <= end; i += kLanes) {
        __builtin_prefetch(codes + i + kAhead / 2, 0, 0);
        store(to + i, decoded(codes + i) * scale);
      }
      if (i < end) {
        Code part[kLanes] = {};
        std::memcpy(part, codes + i, end - i);
        store_part(to + i, decoded(part) * scale, end - i);
      }
    }
  }
}

template <typename X>
void fp8_product(ffi::ThreadPool& pool, const Shape& s, const X* x, const Code* codes, const float* scales, X* y,
                 const std::vector<Item>& groups) {
  const Index weight = s.inner * s.outer, blocks = ceil_div(s.inner, kBlock) * ceil_div(s.outer, kBlock);
  const Index most = std::max<Index>(kLanes, (1 << 14) / std::max<Index>(1, s.inner) / kLanes * kLanes);  // 64 KB
  each_product(pool, s, y, groups, [&](const Item& t, X* to) {
    const Blocks w{codes + t.group * weight, scales + t.group * blocks};
    float* wide = scratch<float>(kWide, most * s.inner + kLanes);
    for (Index n = t.first; n < t.last; n += most) {
      const Index count = std::min(most, t.last - n);
      multiply_out(w, s.inner, n, count, wide);
      product_item(s, x + t.row * s.inner, wide, to + n, t.rows, 0, count);
    }
  });
}

// The groups' codes are those from `first` on; scales are these groups' alone.
ffi::Error fp8_product_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                               ffi::AnyBuffer sizes, ffi::AnyBuffer first, ffi::Result<ffi::AnyBuffer> y) {
  const Shape shape{x.dimensions()[1], y->dimensions()[1], true};
  const auto groups = groups_of(sizes, x.dimensions()[0], shape.outer);
  const Index skipped = first_of(codes, sizes, first) * shape.inner * shape.outer;
  return with_type(x, [&](auto* rows) {
    using X = std::remove_pointer_t<decltype(rows)>;
    fp8_product<X>(pool, shape, rows, data<const Code>(codes) + skipped, data<const float>(scales), data<X>(*y),
                   groups);
    return ffi::Error::Success();
  });
}

}  // namespace
