// The routed experts of one device, a call each way, for CPU; for native.cc, of whose items it is made. swiglu.py has
// the formulas.
//
// An item of work takes some rows of one expert all the way from token to result: what lies between stays in cache, and
// neither gathered rows nor padded ones are ever written to memory. Results go to their pair's place, so that a token's
// sum reads rows that lie together.
//
// Legend: N tokens, K choices, D hidden, F expert width, E experts; pair p is choice p % K of token p / K.

#pragma once

namespace {

// Which pairs each expert works on, and the order in which rows lie: by expert, tokens in order within each.
struct Pairs {
  const std::int32_t* ids;  // E or more: none
  Index tokens, choices, experts;
  std::vector<std::int32_t> of_row;
  std::vector<Item> groups;

  Pairs(ffi::AnyBuffer ids_NK, Index experts)
      : ids(static_cast<const std::int32_t*>(ids_NK.untyped_data())),
        tokens(ids_NK.dimensions()[0]),
        choices(ids_NK.dimensions()[1]),
        experts(experts) {
    std::vector<Index> next(experts + 1, 0);
    for (Index p = 0; p < count(); ++p) {
      if (has_expert(p)) ++next[ids[p] + 1];
    }
    for (Index e = 0; e < experts; ++e) {
      groups.push_back({e, next[e], next[e + 1], 0, 1});  // a single column: no item is cut across
      next[e + 1] += next[e];
    }
    groups.push_back({-1, next[experts], 0, 0, 1});
    of_row.resize(next[experts]);
    for (Index p = 0; p < count(); ++p) {
      if (has_expert(p)) of_row[next[ids[p]]++] = static_cast<std::int32_t>(p);
    }
  }
  Index count() const { return tokens * choices; }
  bool has_expert(Index pair) const { return ids[pair] >= 0 && ids[pair] < experts; }
};

template <typename W>
struct Weights {
  const W *gate, *up, *down;  // [E, F, D] twice, [E, D, F]
  Index hidden, width;
  Index at(const Item& t) const { return t.group * hidden * width; }
};

// An item's rows of x [N, D], one after the other.
template <typename X>
X* gather_item(const Pairs& pairs, const Item& t, const X* x, Index hidden) {
  X* rows = scratch<X>(kRowsOf, t.rows * hidden);
  for (Index r = 0; r < t.rows; ++r) {
    std::memcpy(rows + r * hidden, x + pairs.of_row[t.row + r] / pairs.choices * hidden, hidden * sizeof(X));
  }
  return rows;
}

// y_n = sum_k scale_nk rows_nk in float32; without scales if there are none.
template <typename X>
void sum_choices(ffi::ThreadPool& pool, Index threads, const Pairs& pairs, const X* rows, const float* scale, X* y,
                 Index hidden) {
  constexpr Index kTokens = 64;
  parallel(pool, threads, ceil_div(pairs.tokens, kTokens), [&](Index i) {
    for (Index n = i * kTokens; n < std::min(pairs.tokens, (i + 1) * kTokens); ++n) {
      for (Index j = 0; j < hidden; j += kLanes) {
        Vec sum = {};
        for (Index p = n * pairs.choices; p < (n + 1) * pairs.choices; ++p) {
          if (pairs.has_expert(p)) sum += load_part(rows + p * hidden + j, hidden - j) * (scale ? scale[p] : 1.f);
        }
        store_part(y + n * hidden + j, sum, hidden - j);
      }
    }
  });
}

inline Vec sigmoid(Vec x) {
  const Vec most = Vec{} + 88.f;
  return 1.f / (1.f + exp_of(-x < most ? -x : most));
}

// y [N, D], and gate and up [rows, F] if these are kept; `results` [pairs, D] is for use inside.
template <typename X, typename W>
void experts_forward(ffi::ThreadPool& pool, const Pairs& pairs, const Weights<W>& w, const X* x, const float* scale,
                     X* y, X* gate, X* up, X* results) {
  const Index hidden = w.hidden, width = w.width;
  const Shape inwards{hidden, width, true}, outwards{width, hidden, true};
  const Index threads = threads_for(pool, pairs.groups, 3 * hidden * width);
  const auto items = product_items(pairs.groups, threads);
  parallel(
      pool, threads, items.size(),
      [&](Index i) {
        const Item& t = items[i];
        X *rows = gather_item(pairs, t, x, hidden), *gated = scratch<X>(kInner, t.rows * width);
        X* here = gate != nullptr ? nullptr : scratch<X>(kOther, 2 * t.rows * width);
        X* g = gate != nullptr ? gate + t.row * width : here;
        X* u = gate != nullptr ? up + t.row * width : here + t.rows * width;
        product_item(inwards, rows, w.gate + w.at(t), g, t.rows, 0, width);
        product_item(inwards, rows, w.up + w.at(t), u, t.rows, 0, width);
        for (Index j = 0, count = t.rows * width; j < count; j += kLanes) {
          const Vec a = load_part(g + j, count - j);
          store_part(gated + j, a * sigmoid(a) * load_part(u + j, count - j), count - j);
        }
        product_item(outwards, gated, w.down + w.at(t), rows, t.rows, 0, hidden);
        for (Index r = 0; r < t.rows; ++r) {
          std::memcpy(results + pairs.of_row[t.row + r] * hidden, rows + r * hidden, hidden * sizeof(X));
        }
      },
      few_in_all(pairs.groups));
  sum_choices(pool, threads, pairs, results, scale, y, hidden);
}

// What the backward pass is given: x and g [N, D], scale [pairs], the forward pass's gate and up [rows, F].
template <typename X>
struct Given {
  const X* x;
  const float* scale;
  const X *gate, *up, *g;
};

// Where its results go: dx [N, D], dscale [pairs], and one layer's [E, ...] of each weight.
template <typename X>
struct Gradients {
  X* dx;
  float *dscale, *dgate, *dup, *ddown;
};

// What an item's backward pass leaves for weights' gradients, [rows, F] each; `gated` is scaled.
template <typename X>
struct Inner {
  X *gated, *gate, *up;
};

// Row r: from da = W_down^T g to the gradients of gate and up; returns the scale's gradient.
template <typename X>
float inner_gradients(const X* da, const X* gate, const X* up, float scale, const Inner<X>& to, Index at, Index width) {
  Vec total = {};
  for (Index j = 0; j < width; j += kLanes) {
    const Index left = width - j;
    const Vec g = load_part(gate + at + j, left), u = load_part(up + at + j, left), d = load_part(da + j, left);
    const Vec part = sigmoid(g), silu = g * part;
    total += d * silu * u;
    store_part(to.gated + at + j, silu * u * scale, left);
    store_part(to.up + at + j, d * scale * silu, left);
    store_part(to.gate + at + j, d * scale * u * part * (1.f + g * (1.f - part)), left);
  }
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

// The gradients of weights: rows of x with those of gate and up, rows of g with `gated`.
template <typename X>
void weight_gradients(ffi::ThreadPool& pool, Index threads, const Pairs& pairs, const Given<X>& given,
                      const Inner<X>& inner, const Gradients<X>& to, Index hidden, Index width) {
  std::vector<Item> inwards = pairs.groups, outwards = pairs.groups;
  for (Item& t : inwards) t.last = hidden;
  for (Item& t : outwards) t.last = width;
  inwards = gradient_items(inwards, threads), outwards = gradient_items(outwards, threads);
  const Index count = inwards.size();
  parallel(pool, threads, count + outwards.size(), [&](Index i) {
    const bool in = i < count;
    const Item& t = in ? inwards[i] : outwards[i - count];
    const Index at = t.group * hidden * width;
    const X* rows = gather_item(pairs, t, in ? given.x : given.g, hidden);
    if (in) {
      gradient_item(inner.gate + t.row * width, width, rows, to.dgate + at, t, width, hidden);
      gradient_item(inner.up + t.row * width, width, rows, to.dup + at, t, width, hidden);
    } else {
      gradient_item(rows, hidden, inner.gated + t.row * width, to.ddown + at, t, hidden, width);
    }
  });
}

template <typename X, typename W>
void experts_backward(ffi::ThreadPool& pool, const Pairs& pairs, const Weights<W>& w, const Given<X>& given,
                      const Inner<X>& inner, X* results, const Gradients<X>& to) {
  const Index hidden = w.hidden, width = w.width;
  const Shape inwards{hidden, width, false}, outwards{width, hidden, false};
  const Index threads = threads_for(pool, pairs.groups, 3 * hidden * width);
  const auto items = product_items(pairs.groups, threads);
  std::memset(to.dscale, 0, pairs.count() * sizeof(float));
  parallel(pool, threads, items.size(), [&](Index i) {
    const Item& t = items[i];
    X *rows = gather_item(pairs, t, given.g, hidden), *da = scratch<X>(kInner, t.rows * width);
    product_item(inwards, rows, w.down + w.at(t), da, t.rows, 0, width);
    for (Index r = 0; r < t.rows; ++r) {
      const Index pair = pairs.of_row[t.row + r], at = (t.row + r) * width;
      to.dscale[pair] = inner_gradients(da + r * width, given.gate, given.up, given.scale[pair], inner, at, width);
    }
    X* more = scratch<X>(kOther, t.rows * hidden);
    product_item(outwards, inner.gate + t.row * width, w.gate + w.at(t), rows, t.rows, 0, hidden);
    product_item(outwards, inner.up + t.row * width, w.up + w.at(t), more, t.rows, 0, hidden);
    for (Index r = 0; r < t.rows; ++r) {
      X* row = results + pairs.of_row[t.row + r] * hidden;
      for (Index j = 0; j < hidden; j += kLanes) {
        const Vec sum = load_part(rows + r * hidden + j, hidden - j) + load_part(more + r * hidden + j, hidden - j);
        store_part(row + j, sum, hidden - j);
      }
    }
  });
  weight_gradients(pool, threads, pairs, given, inner, to, hidden, width);
  sum_choices<X>(pool, threads, pairs, results, nullptr, to.dx, hidden);
}

// One layer's, where they lie in the stack of all: [L, E, ...].
template <typename W>
Weights<W> weights_of(const W* gate, ffi::AnyBuffer up, ffi::AnyBuffer down, ffi::AnyBuffer layer) {
  const auto dims = down.dimensions();  // L, E, D, F
  const Index skipped = part_of(down, layer);
  return {gate + skipped, data<const W>(up) + skipped, data<const W>(down) + skipped, dims[2], dims[3]};
}

ffi::Error experts_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer ids,
                           ffi::AnyBuffer w_gate, ffi::AnyBuffer w_up, ffi::AnyBuffer w_down, ffi::AnyBuffer layer,
                           ffi::AnyBuffer /* gate as given: the result is its memory */,
                           ffi::AnyBuffer /* up as given */, ffi::Result<ffi::AnyBuffer> y,
                           ffi::Result<ffi::AnyBuffer> gate, ffi::Result<ffi::AnyBuffer> up,
                           ffi::Result<ffi::AnyBuffer> results) {
  const Pairs pairs(ids, w_gate.dimensions()[1]);
  const bool keep = gate->element_count() > 0;
  return with_type(x, [&](auto* rows) {
    using X = std::remove_pointer_t<decltype(rows)>;
    return with_type(w_gate, [&](auto* first) {
      const Weights<std::remove_pointer_t<decltype(first)>> weights = weights_of(first, w_up, w_down, layer);
      X *g = keep ? data<X>(*gate) + part_of(*gate, layer) : nullptr,
        *u = keep ? data<X>(*up) + part_of(*up, layer) : nullptr;
      experts_forward<X>(pool, pairs, weights, rows, data<const float>(scale), data<X>(*y), g, u, data<X>(*results));
      return ffi::Error::Success();
    });
  });
}

ffi::Error experts_gradient_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::AnyBuffer ids,
                                    ffi::AnyBuffer w_gate, ffi::AnyBuffer w_up, ffi::AnyBuffer w_down,
                                    ffi::AnyBuffer layer, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::AnyBuffer g,
                                    ffi::AnyBuffer /* dgate as given: the result is its memory */,
                                    ffi::AnyBuffer /* dup as given */, ffi::AnyBuffer /* ddown as given */,
                                    ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                                    ffi::Result<ffi::AnyBuffer> dgate, ffi::Result<ffi::AnyBuffer> dup,
                                    ffi::Result<ffi::AnyBuffer> ddown, ffi::Result<ffi::AnyBuffer> inner_gated,
                                    ffi::Result<ffi::AnyBuffer> inner_gate, ffi::Result<ffi::AnyBuffer> inner_up,
                                    ffi::Result<ffi::AnyBuffer> results) {
  const Pairs pairs(ids, w_gate.dimensions()[1]);
  return with_type(x, [&](auto* rows) {
    using X = std::remove_pointer_t<decltype(rows)>;
    return with_type(w_gate, [&](auto* first) {
      const Weights<std::remove_pointer_t<decltype(first)>> weights = weights_of(first, w_up, w_down, layer);
      const Inner<X> inner{data<X>(*inner_gated), data<X>(*inner_gate), data<X>(*inner_up)};
      const Given<X> given{rows, data<const float>(scale), data<const X>(gate) + part_of(gate, layer),
                           data<const X>(up) + part_of(up, layer), data<const X>(g)};
      const Gradients<X> to{data<X>(*dx), data<float>(*dscale), data<float>(*dgate) + part_of(*dgate, layer),
                            data<float>(*dup) + part_of(*dup, layer), data<float>(*ddown) + part_of(*ddown, layer)};
      experts_backward<X>(pool, pairs, weights, given, inner, data<X>(*results), to);
      return ffi::Error::Success();
    });
  });
}

// Memory as it comes.
ffi::Error empty_handler(ffi::ThreadPool, ffi::Result<ffi::AnyBuffer>, std::int64_t) { return ffi::Error::Success(); }

}  // namespace
