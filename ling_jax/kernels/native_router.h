// The router's choice of experts for CPU; for native.cc. router.py has the rule.
//
// Legend: N tokens, E experts, G groups, K choices.

#pragma once

namespace {

// The order of XLA's top_k: NaN before everything; of equals the first.
inline bool before(float a, float b) { return a > b || (a != a && b == b); }

// The best `count` numbers, best first, of those that are offered in order.
struct Best {
  Index count, found = 0;
  float* values;
  std::int32_t* ids;

  void offer(float value, std::int32_t id) {
    if (found == count && !before(value, values[count - 1])) return;
    Index at = found < count ? found++ : count - 1;
    for (; at > 0 && before(value, values[at - 1]); --at) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = value, ids[at] = id;
  }
};

// The best two of a group, added.
inline float worth(const float* scores, Index size) {
  float values[2];
  std::int32_t ids[2];
  Best best{2, 0, values, ids};
  for (Index i = 0; i < size; ++i) best.offer(scores[i], 0);
  return values[0] + values[1];
}

// ids [K] of the best of the experts in the best `open` of G groups.
void choose(const float* scores, Index size, Index groups, Index open, Index choices, float* values,
            std::int32_t* group_ids, std::int32_t* ids) {
  Best best_groups{open, 0, values, group_ids};
  for (Index g = 0; g < groups; ++g) best_groups.offer(worth(scores + g * size, size), static_cast<std::int32_t>(g));
  std::sort(group_ids, group_ids + open);  // in the order of their experts
  Best best{choices, 0, values, ids};
  for (Index i = 0; i < open; ++i) {
    for (Index e = group_ids[i] * size; e < (group_ids[i] + 1) * size; ++e) {
      best.offer(scores[e], static_cast<std::int32_t>(e));
    }
  }
}

ffi::Error choose_handler(ffi::ThreadPool pool, ffi::AnyBuffer scores, ffi::Result<ffi::AnyBuffer> ids,
                          std::int64_t groups, std::int64_t open) {
  constexpr Index kTokens = 64;
  const Index tokens = scores.dimensions()[0], experts = scores.dimensions()[1], choices = ids->dimensions()[1];
  const Index threads = tokens <= kTokens ? 1 : std::max<Index>(1, pool.num_threads());
  parallel(pool, threads, ceil_div(tokens, kTokens), [&](Index part) {
    float* values = scratch<float>(kA, std::max<Index>(choices, open));
    std::int32_t* group_ids = scratch<std::int32_t>(kB, open);
    for (Index n = part * kTokens; n < std::min(tokens, (part + 1) * kTokens); ++n) {
      choose(data<const float>(scores) + n * experts, experts / groups, groups, open, choices, values, group_ids,
             data<std::int32_t>(*ids) + n * choices);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
