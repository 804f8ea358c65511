// Attention for CPU that keeps no scores (FlashAttention, arXiv 2205.14135); for native.cc, whose tiles it uses.
//
// Legend: B rows, T queries, S keys, H query heads, G kv heads, M = H/G, C head_dim, as in attention.py.
//
// Queries and keys are cut where their segment changes, so that a block of queries sees a block of keys whole or, where
// causal, up to the diagonal: masked products are left out, and one document's NaN meets no other's numbers. A block of
// queries is the M heads of its tokens under one another, so that they share keys: query r is head r % M of token r/M.
// Scores lie across, [keys, queries], a vector's lanes being queries. All arithmetic is float32.

#pragma once

#include <cmath>

namespace {

constexpr Index kBlockQueries = 256;  // heads included
constexpr Index kBlockKeys = 64;
constexpr float kMasked = -1e30f;

// To 2 ulp, for x <= 88; 0 where the result is no normal number. NaN stays NaN.
inline Vec exp_of(Vec x) {
  constexpr float kShift = 0x1.8p23f;  // leaves a sum's whole part in its lowest bits
  const Vec shifted = x * 0x1.715476p0f + kShift;
  const Vec whole = shifted - kShift;
  const Vec rest = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
  Vec sum = rest * 0x1.0f9f9cp-7f + 0x1.573a1ap-5f;
  sum = sum * rest + 0x1.555a80p-3f;
  sum = sum * rest + 0x1.fffdc6p-2f;
  sum = sum * rest + 0x1.fffff6p-1f;
  sum = sum * rest + 1.f;
  const Vec scaled = (Vec)((Bits)sum + ((Bits)shifted << 23));
  return x < -87.3f ? Vec{} : scaled;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Index whole_panels(Index columns) { return ceil_div(columns, kColumns) * kColumns; }

struct Attention {
  Index batch, queries, keys, heads, groups, width;  // B T S H G C
  float scale;
  bool causal;
  Index shared() const { return heads / groups; }
  Index padded() const { return whole_panels(width); }
  Index most_tokens() const { return std::max<Index>(1, kBlockQueries / shared()); }
  Index most_rows() const { return whole_panels(most_tokens() * shared()); }
  // All of the pool, or this thread alone when waking another takes longer than the work.
  Index threads(const ffi::ThreadPool& pool) const {
    const bool small = batch * queries * keys * heads * width < (1 << 21);
    return small ? 1 : std::max<Index>(1, pool.num_threads());
  }
  // Where a token's numbers of group g begin, `each` of them to a group.
  Index at(Index row, Index length, Index token, Index g, Index each) const {
    return ((row * length + token) * groups + g) * each;
  }
};

// Consecutive tokens of one segment.
struct Span {
  Index first, count;
  std::int32_t segment;
};
using Spans = std::vector<std::vector<Span>>;  // of each row

Spans spans_of(ffi::AnyBuffer segments, Index most) {
  const auto* s = static_cast<const std::int32_t*>(segments.untyped_data());
  const Index batch = segments.dimensions()[0], length = segments.dimensions()[1];
  Spans spans(batch);
  for (Index b = 0; b < batch; ++b, s += length) {
    for (Index i = 0; i < length; ++i) {
      const bool goes_on = i > 0 && s[i] == s[i - 1] && spans[b].back().count < most;
      if (goes_on) {
        ++spans[b].back().count;
      } else {
        spans[b].push_back({i, 1, s[i]});
      }
    }
  }
  return spans;
}

// Which of a block's queries see which of a block's keys.
struct View {
  Index first, keys, rows, shared;  // first: the queries' first token, counted from the first key
  bool causal;
  View(const Attention& a, const Span& q, const Span& k)
      : first(q.first - k.first), keys(k.count), rows(q.count * a.shared()), shared(a.shared()), causal(a.causal) {}
  // Keys, from the first, that query r sees.
  Index seen(Index r) const { return causal ? std::clamp<Index>(first + r / shared + 1, 0, keys) : keys; }
  // Queries before the first that sees key k.
  Index blind(Index k) const { return causal ? std::clamp<Index>((k - first) * shared, 0, rows) : 0; }
};

bool meet(const Attention& a, const Span& q, const Span& k) {
  return q.segment == k.segment && (!a.causal || k.first < q.first + q.count);
}

// As `scratch`, in more places, with room for a vector past the end.
float* memory(int place, Index count) {
  thread_local std::array<std::vector<Line>, 14> places;
  const std::size_t lines = (count + kLanes) * sizeof(float) / sizeof(Line) + 1;
  if (places[place].size() < lines) places[place] = std::vector<Line>(lines);
  return reinterpret_cast<float*>(places[place].data());
}

// Lines of `length` numbers, `stride` apart, times `scale`, one after the other. Writes a vector past the end.
template <typename X>
void gather(const X* from, Index stride, Index lines, Index length, float scale, float* to) {
  for (Index i = 0; i < lines; ++i, from += stride, to += length) {
    for (Index j = 0; j < length; j += kLanes) store(to + j, load_part(from + j, length - j) * scale);
  }
}

// Scores of the panel of queries from n on and the keys that any of them sees, kMasked where one does not; lines are
// `stride` apart. Returns how many keys that is.
Index panel_scores(const View& view, const float* k, const float* q, Index width, Index n, float* s, Index stride) {
  const Index seen = view.seen(std::min(n + kColumns, view.rows) - 1);
  multiply_panels<false>(k, width, q + n * width, width, s, stride, seen, kColumns, Put::kSet);
  for (Index i = view.seen(n); i < seen; ++i) {
    std::fill_n(s + i * stride, std::clamp<Index>(view.blind(i) - n, 0, kColumns), kMasked);
  }
  return seen;
}

// ---- forward ----

struct Forward {
  const Attention& a;
  const Index most = a.most_rows(), padded = a.padded();
  float *rows = memory(0, most* a.width), *across = memory(1, most* a.width);  // queries, also as panels of q^T
  float *keys = memory(2, kBlockKeys* a.width), *values = memory(3, kBlockKeys* padded);
  float* scores = memory(4, kBlockKeys* kColumns);  // then weights
  float *sums = memory(5, most* padded), *top = memory(6, most), *total = memory(7, most);
  float* shrink = memory(8, kColumns);
};

// Scores [seen, kColumns] become weights under the new maximum; what was summed before is to be multiplied by `shrink`.
void weigh(float* scores, Index seen, float* top, float* total, float* shrink) {
  const Vec before[] = {load(top), load(top + kLanes)};
  Vec now[] = {before[0], before[1]}, sums[2] = {};
  for (const float* s = scores; s < scores + seen * kColumns; s += kColumns) {
    for (int i = 0; i < 2; ++i) now[i] = larger(load(s + i * kLanes), now[i]);
  }
  for (float* s = scores; s < scores + seen * kColumns; s += kColumns) {
    for (int i = 0; i < 2; ++i) {
      const Vec weights = exp_of(load(s + i * kLanes) - now[i]);
      store(s + i * kLanes, weights);
      sums[i] += weights;
    }
  }
  for (int i = 0; i < 2; ++i, top += kLanes, total += kLanes, shrink += kLanes) {
    const Vec factor = exp_of(before[i] - now[i]);
    store(top, now[i]);
    store(shrink, factor);
    store(total, load(total) * factor + sums[i]);
  }
}

// sums [rows, padded] = sums * shrink + weights^T values
void add_values(const View& view, const Forward& f, Index n) {
  const Index rows = std::min<Index>(kColumns, view.rows - n), padded = f.padded;
  float* sums = f.sums + n * padded;
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < padded; c += kLanes) {
      store(sums + r * padded + c, load(sums + r * padded + c) * f.shrink[r]);
    }
  }
  for (Index c = 0; c < padded; c += kColumns) {
    for_tiles(rows, [&](Index m, Index height) {
      const auto tile = kTiles<true>[height - 1];
      tile(f.scores + m, kColumns, f.values + c * view.keys, view.seen(n + m + height - 1), sums + m * padded + c,
           padded, kColumns, Put::kAdd);
    });
  }
}

void write_answer(const Forward& f, const Span& q, Index row, Index g, float* out, float* lse) {
  const Attention& a = f.a;
  const Index shared = a.shared();
  for (Index r = 0; r < q.count * shared; ++r) {
    const Index at = a.at(row, a.queries, q.first + r / shared, g, shared) + r % shared;
    const bool lonely = f.total[r] == 0;
    const float factor = lonely ? 0 : 1 / f.total[r];
    lse[at] = lonely ? kMasked : f.top[r] + std::log(f.total[r]);
    for (Index c = 0; c < a.width; c += kLanes) {
      store_part(out + at * a.width + c, load(f.sums + r * f.padded + c) * factor, a.width - c);
    }
  }
}

// One block of queries of a group over all its keys.
template <typename X>
void attend_block(const Attention& a, const X* q, const X* k, const X* v, const Span& block,
                  const std::vector<Span>& keys, Index row, Index g, float* out, float* lse) {
  const Forward f{a};
  const Index each = a.shared() * a.width, rows = block.count * a.shared(), stride = a.groups * a.width;
  gather(q + a.at(row, a.queries, block.first, g, each), a.groups * each, block.count, each, a.scale, f.rows);
  pack_transposed<float>(f.rows, a.width, a.width, rows, f.across);
  std::fill_n(f.sums, rows * f.padded, 0.f);
  std::fill_n(f.top, whole_panels(rows), kMasked);
  std::fill_n(f.total, whole_panels(rows), 0.f);
  for (const Span& span : keys) {
    if (!meet(a, block, span)) continue;
    const View view(a, block, span);
    const Index at = a.at(row, a.keys, span.first, g, a.width);
    gather(k + at, stride, span.count, a.width, 1, f.keys);
    pack_panels<float>(v + at, stride, span.count, a.width, f.values);
    for (Index n = view.blind(0) / kColumns * kColumns; n < rows; n += kColumns) {
      const Index seen = panel_scores(view, f.keys, f.across, a.width, n, f.scores, kColumns);
      weigh(f.scores, seen, f.top + n, f.total + n, f.shrink);
      add_values(view, f, n);
    }
  }
  write_answer(f, block, row, g, out, lse);
}

template <typename X>
void attend(ffi::ThreadPool& pool, const Attention& a, const X* q, const X* k, const X* v, const Spans& queries,
            const Spans& keys, float* out, float* lse) {
  std::vector<std::pair<Index, Index>> items;  // row and block
  for (Index b = 0; b < a.batch; ++b) {
    for (Index i = 0; i < static_cast<Index>(queries[b].size()); ++i) items.push_back({b, i});
  }
  parallel(pool, a.threads(pool), items.size() * a.groups, [&](Index i) {
    const auto [row, block] = items[i / a.groups];
    attend_block(a, q, k, v, queries[row][block], keys[row], row, i % a.groups, out, lse);
  });
}

// ---- backward ----

template <typename X, typename O>
struct Arrays {
  const X *q, *k, *v;
  const O* out;
  const float* lse;
  const X* g;
  float *dq, *dk, *dv;
};

struct Backward {
  const Attention& a;
  const Index most = a.most_rows(), padded = a.padded();
  const Index stride = most + 16;  // of weights' lines; those of a power of two share few places of the first cache
  // Queries and the cotangents of their outputs; `across` as panels of their transposes.
  float *rows = memory(0, most* a.width), *across = memory(1, most* a.width), *panels = memory(2, most* padded);
  float *g_rows = memory(3, most* a.width), *g_across = memory(4, most* a.width);
  float *g_panels = memory(5, most* padded), *dq = memory(6, most* padded);
  float *lse = memory(7, most), *delta = memory(8, most);
  float *keys = memory(9, kBlockKeys* a.width), *values = memory(10, kBlockKeys* a.width);
  float* key_panels = memory(11, kBlockKeys* padded);
  float *weights = memory(12, kBlockKeys* stride), *dscores = memory(13, kBlockKeys* stride);
};

// A block of queries with what the backward pass knows of them.
template <typename X, typename O>
void load_queries(const Backward& b, const Arrays<X, O>& x, const Span& block, Index row, Index g) {
  const Attention& a = b.a;
  const Index shared = a.shared(), each = shared * a.width, stride = a.groups * each, rows = block.count * shared;
  const Index at = a.at(row, a.queries, block.first, g, each);
  gather(x.q + at, stride, block.count, each, a.scale, b.rows);
  gather(x.g + at, stride, block.count, each, 1, b.g_rows);
  pack_transposed<float>(b.rows, a.width, a.width, rows, b.across);
  pack_transposed<float>(b.g_rows, a.width, a.width, rows, b.g_across);
  pack_panels<float>(b.rows, a.width, rows, a.width, b.panels);
  pack_panels<float>(b.g_rows, a.width, rows, a.width, b.g_panels);
  std::fill_n(b.lse, whole_panels(rows), 0.f);
  std::fill_n(b.delta, whole_panels(rows), 0.f);
  for (Index r = 0; r < rows; ++r) {
    const Index head = a.at(row, a.queries, block.first + r / shared, g, shared) + r % shared;
    const Vec sums = partial_sums(b.g_rows + r * a.width, x.out + head * a.width, a.width);
    for (int i = 0; i < kLanes; ++i) b.delta[r] += sums[i];
    b.lse[r] = x.lse[head];
  }
}

// The weights of a block of queries and keys, and the cotangents of the scores; zeros where a key is not seen.
void pair_weights(const Backward& b, const View& view) {
  const Index width = b.a.width;
  for (Index n = 0; n < view.rows; n += kColumns) {
    const Index seen = panel_scores(view, b.keys, b.across, width, n, b.weights + n, b.stride);
    multiply_panels<false>(b.values, width, b.g_across + n * width, width, b.dscores + n, b.stride, seen, kColumns,
                           Put::kSet);
    for (Index half = n; half < n + kColumns; half += kLanes) {
      const Vec lse = load(b.lse + half), delta = load(b.delta + half);
      for (Index i = 0; i < view.keys; ++i) {
        float *weights = b.weights + i * b.stride + half, *dscores = b.dscores + i * b.stride + half;
        const Vec weight = i < seen ? exp_of(load(weights) - lse) : Vec{};
        store(weights, weight);
        store(dscores, i < seen ? weight * (load(dscores) - delta) : Vec{});
      }
    }
  }
}

// dx [keys, width] += from [keys, rows] times packed rows; what no query sees is left out.
void add_to_keys(const Backward& b, const View& view, const float* from, const float* panels, float* dx) {
  const Index width = b.a.width, stride = b.a.groups * width;
  for (Index c = 0; c < width; c += kColumns) {
    for_tiles(view.keys, [&](Index m, Index height) {
      const Index first = view.blind(m);
      kTiles<false>[height - 1](from + m * b.stride + first, b.stride, panels + c * view.rows + first * kColumns,
                                view.rows - first, dx + m * stride + c, stride, std::min<Index>(kColumns, width - c),
                                Put::kAdd);
    });
  }
}

// dq += dscores^T keys
void add_to_queries(const Backward& b, const View& view) {
  for (Index c = 0; c < b.padded; c += kColumns) {
    for_tiles(view.rows, [&](Index m, Index height) {
      kTiles<true>[height - 1](b.dscores + m, b.stride, b.key_panels + c * view.keys, view.seen(m + height - 1),
                               b.dq + m * b.padded + c, b.padded, kColumns, Put::kAdd);
    });
  }
}

// What a block of queries and one of keys add to the gradients of either.
template <bool kQueries, bool kKeys, typename X, typename O>
void add_pair(const Backward& b, const Arrays<X, O>& x, const Span& block, const Span& span, Index row, Index g) {
  const Attention& a = b.a;
  const View view(a, block, span);
  const Index at = a.at(row, a.keys, span.first, g, a.width), stride = a.groups * a.width;
  gather(x.k + at, stride, span.count, a.width, 1, b.keys);
  gather(x.v + at, stride, span.count, a.width, 1, b.values);
  pair_weights(b, view);
  if (kKeys) {
    add_to_keys(b, view, b.weights, b.g_panels, x.dv + at);
    add_to_keys(b, view, b.dscores, b.panels, x.dk + at);
  }
  if (kQueries) {
    pack_panels<float>(b.keys, a.width, span.count, a.width, b.key_panels);
    add_to_queries(b, view);
  }
}

// dq of a block of queries and, with kKeys, their part of dk and dv.
template <bool kKeys, typename X, typename O>
void query_gradients(const Attention& a, const Arrays<X, O>& x, const Span& block, const std::vector<Span>& keys,
                     Index row, Index g) {
  const Backward b{a};
  const Index shared = a.shared();
  load_queries(b, x, block, row, g);
  std::fill_n(b.dq, block.count * shared * b.padded, 0.f);
  for (const Span& span : keys) {
    if (meet(a, block, span)) add_pair<true, kKeys>(b, x, block, span, row, g);
  }
  for (Index r = 0; r < block.count * shared; ++r) {
    float* to = x.dq + (a.at(row, a.queries, block.first + r / shared, g, shared) + r % shared) * a.width;
    for (Index c = 0; c < a.width; c += kLanes) {
      store_part(to + c, load(b.dq + r * b.padded + c) * a.scale, a.width - c);
    }
  }
}

template <typename X, typename O>
void key_gradients(const Attention& a, const Arrays<X, O>& x, const std::vector<Span>& queries, const Span& span,
                   Index row, Index g) {
  const Backward b{a};
  for (const Span& block : queries) {
    if (!meet(a, block, span)) continue;
    load_queries(b, x, block, row, g);
    add_pair<false, true>(b, x, block, span, row, g);
  }
}

// A thread takes a row's group whole, in five products of a pair; or, where there are too few of those, blocks of
// queries for dq and blocks of keys for dk and dv, in seven. All sums are taken in the same order.
template <typename X, typename O>
void attend_backward(ffi::ThreadPool& pool, const Attention& a, const Arrays<X, O>& x, const Spans& queries,
                     const Spans& keys) {
  const Index threads = a.threads(pool), wholes = a.batch * a.groups;
  std::fill_n(x.dk, a.batch * a.keys * a.groups * a.width, 0.f);
  std::fill_n(x.dv, a.batch * a.keys * a.groups * a.width, 0.f);
  if (5 * threads * ceil_div(wholes, threads) <= 7 * wholes) {
    return parallel(pool, threads, wholes, [&](Index i) {
      const Index row = i / a.groups, g = i % a.groups;
      for (const Span& block : queries[row]) query_gradients<true>(a, x, block, keys[row], row, g);
    });
  }
  struct Item {
    Index row, g;
    const Span *block, *span;  // one of the two
  };
  std::vector<Item> items;
  for (Index i = 0; i < wholes; ++i) {
    const Index row = i / a.groups, g = i % a.groups;
    for (const Span& block : queries[row]) items.push_back({row, g, &block, nullptr});
    for (const Span& span : keys[row]) items.push_back({row, g, nullptr, &span});
  }
  parallel(pool, threads, items.size(), [&](Index i) {
    const auto& [row, g, block, span] = items[i];
    if (block) {
      query_gradients<false>(a, x, *block, keys[row], row, g);
    } else {
      key_gradients(a, x, queries[row], *span, row, g);
    }
  });
}

// ---- handlers ----

Attention attention_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, float scale, bool causal) {
  const auto queries = q.dimensions(), keys = k.dimensions();
  return {queries[0], queries[1], keys[1], queries[2], keys[2], queries[3], scale, causal};
}

ffi::Error attention_handler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                             ffi::AnyBuffer q_segments, ffi::AnyBuffer kv_segments, ffi::Result<ffi::AnyBuffer> out,
                             ffi::Result<ffi::AnyBuffer> lse, float scale, bool causal) {
  const Attention a = attention_of(q, k, scale, causal);
  const Spans queries = spans_of(q_segments, a.most_tokens()), keys = spans_of(kv_segments, kBlockKeys);
  return with_type(q, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    attend(pool, a, x, data<X>(k), data<X>(v), queries, keys, data<float>(*out), data<float>(*lse));
    return ffi::Error::Success();
  });
}

ffi::Error attention_gradient_handler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                      ffi::AnyBuffer q_segments, ffi::AnyBuffer kv_segments, ffi::AnyBuffer out,
                                      ffi::AnyBuffer lse, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dq,
                                      ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv, float scale,
                                      bool causal) {
  const Attention a = attention_of(q, k, scale, causal);
  const Spans queries = spans_of(q_segments, a.most_tokens()), keys = spans_of(kv_segments, kBlockKeys);
  return with_type(q, [&](auto* x) {
    return with_type(out, [&](auto* o) {
      using X = std::remove_pointer_t<decltype(x)>;
      using O = std::remove_pointer_t<decltype(o)>;
      const Arrays<X, O> arrays{x,
                                data<X>(k),
                                data<X>(v),
                                o,
                                data<float>(lse),
                                data<X>(g),
                                data<float>(*dq),
                                data<float>(*dk),
                                data<float>(*dv)};
      attend_backward(pool, a, arrays, queries, keys);
      return ffi::Error::Success();
    });
  });
}

}  // namespace
