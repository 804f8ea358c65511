// Attention over the slots of a cache for CPU; for native.cc, made of parts of attention.
//
// Legend: L layers, B rows, T queries, S slots, H query heads, G kv heads, M = H/G, C head_dim.
//
// Decoding waits for memory, so each key and value is read once for all queries that see it, and no slot after the last
// that is seen. A part of the work is a piece of a row's slots for all kv heads, whose numbers lie together; the parts'
// sums are joined afterwards. Where pieces end depends on sizes alone, and so do results.
//
// Query r of a kv head is head r % M of token r / M. Scores lie [queries, slots]: of few queries a vector would be
// mostly empty. All arithmetic is float32.

#pragma once

#include <memory>

namespace {

// Consecutive tokens of a row, which together see the slots before `end`, and the parts that these are cut into.
struct CachedQueries {
  Index row, token, tokens, end, first_part, parts;
};

struct Cached {
  const Attention& a;
  const std::int32_t* slots;  // [B, T]
  std::vector<CachedQueries> blocks;
  std::vector<Index> block_of;  // of each part
  const Index tokens = std::min(a.queries, a.most_tokens());
  const Index most = tokens * a.heads;  // queries of a part
  // Slots of a part: the more queries there are, the more parts there would be.
  const Index piece = 8 * kBlockKeys * ceil_div(a.queries, 16);

  Cached(const Attention& a, const std::int32_t* slots) : a(a), slots(slots) {
    for (Index row = 0; row < a.batch; ++row) {
      for (Index t = 0; t < a.queries; t += tokens) {
        CachedQueries block{row, t, std::min(tokens, a.queries - t), 0, static_cast<Index>(block_of.size()), 0};
        for (Index i = t; i < t + block.tokens; ++i) block.end = std::max(block.end, seen(row, i));
        block.parts = ceil_div(block.end, piece);
        block_of.insert(block_of.end(), block.parts, blocks.size());
        blocks.push_back(block);
      }
    }
  }
  Index seen(Index row, Index token) const {
    return std::clamp<Index>(slots[row * a.queries + token], 0, a.keys - 1) + 1;
  }
  Index part_size() const { return most * (a.padded() + 2); }
  // All of the pool, or this thread alone when waking another takes longer than the work.
  Index threads(const ffi::ThreadPool& pool) const {
    Index pairs = 0;
    for (const CachedQueries& block : blocks) pairs += block.tokens * block.end;
    return pairs * a.heads * a.width < (1 << 19) ? 1 : std::max<Index>(1, pool.num_threads());
  }
};

// The sums of a part for each of its queries: values times weights, the largest score, and weights.
struct Summed {
  float *values, *top, *total;  // [most, padded], [most], [most]
  Summed(const Cached& c, float* parts, Index part)
      : values(parts + part * c.part_size()), top(values + c.most * c.a.padded()), total(top + c.most) {}
};

// f of all lanes, in each of them.
template <int D = kLanes / 2, typename F, int... J>
Vec reduced(Vec v, const F& f, std::integer_sequence<int, J...> lanes) {
#if defined(__clang__)
  v = f(v, __builtin_shufflevector(v, v, (J ^ D)...));
#else
  v = f(v, __builtin_shuffle(v, Bits{(J ^ D)...}));
#endif
  if constexpr (D > 1) return reduced<D / 2>(v, f, lanes);
  return v;
}

// A query's scores of kBlockKeys slots, of which it sees the first, become weights under the new maximum; what was
// summed before is brought under it too.
void weigh_slots(float* scores, Index seen, float* values, Index padded, float& top, float& total) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  if (seen <= 0) {
    std::fill_n(scores, kBlockKeys, 0.f);
    return;
  }
  if (seen < kBlockKeys) std::fill_n(scores + seen, kBlockKeys - seen, kMasked);
  Vec now = Vec{} + top, sums = {};
  for (Index i = 0; i < kBlockKeys; i += kLanes) now = larger(load(scores + i), now);
  now = reduced(now, larger, kAll);
  for (Index i = 0; i < kBlockKeys; i += kLanes) {
    const Vec weights = exp_of(load(scores + i) - now);
    store(scores + i, weights);
    sums += weights;
  }
  const Vec factor = exp_of(top - now);
  total = total * factor[0] + reduced(sums, [](Vec x, Vec y) { return x + y; }, kAll)[0];
  if (now[0] != top) {
    for (Index c = 0; c < padded; c += kLanes) store(values + c, load(values + c) * factor);
  }
  top = now[0];
}

// Brings memory near, line by line in the order in which it lies: twice as fast as what heads' strides would bring.
template <typename X>
void touch(const X* from, Index count) {
  const char *p = reinterpret_cast<const char*>(from), *end = reinterpret_cast<const char*>(from + count);
  for (; p < end; p += sizeof(Line)) static_cast<void>(*static_cast<const volatile char*>(p));
}

// Asks for the next block's keys and values, some lines at a time: of many at once the rest would have to wait.
struct Ahead {
  const char *k, *v;
  Index lines, each;
  template <typename X>
  Ahead(const X* k, const X* v, Index count, Index times)
      : k(reinterpret_cast<const char*>(k)),
        v(reinterpret_cast<const char*>(v)),
        lines(count * sizeof(X) / sizeof(Line)),
        each(ceil_div(lines, times)) {}
  void ask() {
    const Index now = std::min(each, lines);
    for (Index i = 0; i < now; ++i, k += sizeof(Line), v += sizeof(Line)) {
      __builtin_prefetch(k, 0, 2);
      __builtin_prefetch(v, 0, 2);
    }
    lines -= now;
  }
};

// The sums of one part; k and v [B, S, G, C] are one layer's.
template <typename X>
void attend_slots(const Cached& c, Index part, const X* q, const X* k, const X* v, const Summed& to) {
  const Attention& a = c.a;
  const CachedQueries& block = c.blocks[c.block_of[part]];
  const Index shared = a.shared(), rows = block.tokens * shared, each = shared * a.width, stride = a.groups * a.width;
  const Index padded = a.padded(), begin = (part - block.first_part) * c.piece;
  const Index end = std::min(block.end, begin + c.piece);
  float *queries = memory(0, c.most * a.width), *scores = memory(1, rows * kBlockKeys);
  float *keys = memory(2, kBlockKeys * a.width), *values = memory(3, kBlockKeys * padded);
  for (Index g = 0; g < a.groups; ++g) {
    const X* from = q + a.at(block.row, a.queries, block.token, g, each);
    gather(from, a.groups * each, block.tokens, each, a.scale, queries + g * rows * a.width);
  }
  std::fill_n(to.values, a.groups * rows * padded, 0.f);
  std::fill_n(to.top, a.groups * rows, kMasked);
  std::fill_n(to.total, a.groups * rows, 0.f);
  for (Index slot = begin; slot < end; slot += kBlockKeys) {
    const Index count = std::min(kBlockKeys, end - slot);
    const Index here = a.at(block.row, a.keys, slot, 0, a.width);
    touch(k + here, count * stride);
    touch(v + here, count * stride);
    const Index next = here + count * stride, coming = std::min(kBlockKeys, end - slot - count) * stride;
    Ahead ahead(k + next, v + next, coming, a.groups * (rows + 2));
    for (Index g = 0; g < a.groups; ++g) {
      const Index at = here + g * a.width, first = g * rows;
      ahead.ask();
      pack_transposed<float>(k + at, stride, a.width, count, keys);
      multiply_panels<false>(queries + first * a.width, a.width, keys, a.width, scores, kBlockKeys, rows,
                             whole_panels(count), Put::kSet);
      for (Index r = 0; r < rows; ++r) {
        ahead.ask();
        const Index seen = std::min(count, c.seen(block.row, block.token + r / shared) - slot);
        weigh_slots(scores + r * kBlockKeys, seen, to.values + (first + r) * padded, padded, to.top[first + r],
                    to.total[first + r]);
      }
      ahead.ask();
      pack_panels<float>(v + at, stride, count, a.width, values);
      multiply_panels<false>(scores, kBlockKeys, values, count, to.values + first * padded, padded, rows, padded,
                             Put::kAdd);
    }
  }
}

// The answer of a block of queries, from all of its parts in order.
void join_parts(const Cached& c, const CachedQueries& block, float* parts, float* out) {
  const Attention& a = c.a;
  const Index shared = a.shared(), rows = block.tokens * shared, padded = a.padded();
  const Index last = block.first_part + block.parts;
  for (Index r = 0; r < a.groups * rows; ++r) {
    const Index token = block.token + r % rows / shared, head = r / rows * shared + r % shared;
    float top = kMasked, total = 0, *to = out + ((block.row * a.queries + token) * a.heads + head) * a.width;
    for (Index part = block.first_part; part < last; ++part) top = std::max(top, Summed(c, parts, part).top[r]);
    float* sums = memory(4, padded);
    std::fill_n(sums, padded, 0.f);
    for (Index part = block.first_part; part < last; ++part) {
      const Summed from(c, parts, part);
      const float factor = exp_of(Vec{} + (from.top[r] - top))[0];
      total += from.total[r] * factor;
      for (Index i = 0; i < padded; i += kLanes) {
        store(sums + i, load(sums + i) + load(from.values + r * padded + i) * factor);
      }
    }
    for (Index i = 0; i < a.width; i += kLanes) store_part(to + i, load(sums + i) / total, a.width - i);
  }
}

template <typename X>
void attend_cached(ffi::ThreadPool& pool, const Cached& c, const X* q, const X* k, const X* v, float* out) {
  const Index threads = c.threads(pool), count = c.block_of.size();
  const std::unique_ptr<float[]> parts(new float[count * c.part_size()]);
  parallel(
      pool, threads, count, [&](Index i) { attend_slots(c, i, q, k, v, Summed(c, parts.get(), i)); },
      c.a.batch * c.a.queries <= 512);
  parallel(pool, threads, c.blocks.size(), [&](Index i) { join_parts(c, c.blocks[i], parts.get(), out); });
}

ffi::Error cached_handler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                          ffi::AnyBuffer layer, ffi::AnyBuffer slots, ffi::Result<ffi::AnyBuffer> out, float scale) {
  const auto queries = q.dimensions(), keys = k.dimensions();  // [B, T, H, C] and [L, B, S, G, C]
  const Attention a{queries[0], queries[1], keys[2], queries[2], keys[3], queries[3], scale, true};
  const Cached cached(a, data<const std::int32_t>(slots));
  const Index skipped = part_of(k, layer);
  return with_type(q, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    attend_cached<X>(pool, cached, x, data<X>(k) + skipped, data<X>(v) + skipped, data<float>(*out));
    return ffi::Error::Success();
  });
}

}  // namespace
