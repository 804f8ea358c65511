// AdamW's update of one parameter in one pass over memory, for CPU; for native.cc. optimizer.py has the formulas.

#pragma once

#include <cmath>

namespace {

// What changes from step to step, as the caller lays it out.
struct AdamScalars {
  float clip, rate, mean_correction, square_correction, ok;
};
struct AdamRule {
  float b1, b2, eps, decay;
};

inline Vec square_root(Vec x) {
#if defined(__AVX512F__) && LING_LANES == 16
  return (Vec)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// In place: weights and both moments.
void adamw(ffi::ThreadPool& pool, Index count, const AdamScalars& s, const AdamRule& rule, const float* gradient,
           float* weight, float* mean, float* square) {
  constexpr Index kPart = 1 << 15;
  const Index threads = count <= 2 * kPart ? 1 : std::max<Index>(1, pool.num_threads());
  if (s.ok == 0) return;
  parallel(pool, threads, ceil_div(count, kPart), [&](Index part) {
    for (Index i = part * kPart; i < std::min(count, (part + 1) * kPart); i += kLanes) {
      const Index left = std::min(count, (part + 1) * kPart) - i;
      const Vec g = load_part(gradient + i, left) * s.clip, w = load_part(weight + i, left);
      const Vec m = (1 - rule.b1) * g + rule.b1 * load_part(mean + i, left);
      const Vec v = (1 - rule.b2) * (g * g) + rule.b2 * load_part(square + i, left);
      const Vec step = m / s.mean_correction / (square_root(v / s.square_correction) + rule.eps);
      store_part(mean + i, m, left);
      store_part(square + i, v, left);
      store_part(weight + i, w - s.rate * (step + rule.decay * w), left);
    }
  });
}

ffi::Error adamw_handler(ffi::ThreadPool pool, ffi::AnyBuffer weight, ffi::AnyBuffer gradient, ffi::AnyBuffer mean,
                         ffi::AnyBuffer square, ffi::AnyBuffer scalars, ffi::Result<ffi::AnyBuffer> new_weight,
                         ffi::Result<ffi::AnyBuffer> new_mean, ffi::Result<ffi::AnyBuffer> new_square, float b1,
                         float b2, float eps, float decay) {
  const std::array<std::pair<const float*, float*>, 3> pairs = {
      {{data<const float>(weight), data<float>(*new_weight)},
       {data<const float>(mean), data<float>(*new_mean)},
       {data<const float>(square), data<float>(*new_square)}}};
  const Index count = weight.element_count();
  for (const auto& [from, to] : pairs) {  // the same memory, but where XLA chose otherwise
    if (from != to) std::memcpy(to, from, count * sizeof(float));
  }
  AdamScalars now;
  std::memcpy(&now, data<const float>(scalars), sizeof now);
  adamw(pool, count, now, {b1, b2, eps, decay}, data<const float>(gradient), pairs[0].second, pairs[1].second,
        pairs[2].second);
  return ffi::Error::Success();
}

}  // namespace
