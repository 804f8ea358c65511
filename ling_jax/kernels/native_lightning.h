// Lightning attention for CPU: linear attention whose state decays at a constant rate per head; for native.cc, whose
// tiles it uses. lightning.py has the formulas.
//
// Legend: B rows, T tokens, H heads, C width of queries and keys, D of values, as in lightning.py; of the gradients'
// runs, whatever stands in these places.
//
// An item of work takes one head of a row through all its tokens, with the state in cache. Tokens come in pieces of one
// document without its padding, so that padding adds nothing and does not decay, and one document's NaN meets no
// other's numbers. A piece's output is one product of lines (a query, decayed since the state before the piece, and its
// scores with the piece's keys, decayed since those) with panels (the state, under it the piece's values). Lines end at
// their own key, which leaves out most of the products that causality masks. All arithmetic is float32.

#pragma once

#include <cmath>
#include <tuple>

namespace {

constexpr Index kPiece = 32;  // tokens

// Tokens one after the other, of one document.
struct Piece {
  Index first, count;
  bool fresh;    // the document begins here, and not in the state before the row
  bool goes_on;  // someone reads the state after it
};

// The order in which a row's tokens are taken.
struct Route {
  std::vector<Index> tokens, padding;
  std::vector<Piece> pieces;
};
using Routes = std::vector<Route>;  // of each row

Routes routes_of(const ffi::AnyBuffer& segments, bool backwards) {
  const auto* s = static_cast<const std::int32_t*>(segments.untyped_data());
  const Index batch = segments.dimensions()[0], length = segments.dimensions()[1];
  Routes routes(batch);
  for (Route& route : routes) {
    auto& [tokens, padding, pieces] = route;
    for (Index i = 0; i < length; ++i) {
      const Index token = backwards ? length - 1 - i : i;
      if (s[token] <= 0) {
        padding.push_back(token);
        continue;
      }
      const bool first = tokens.empty(), same = !first && s[token] == s[tokens.back()];
      if (same && pieces.back().count < kPiece) {
        ++pieces.back().count;
      } else {
        if (!first) pieces.back().goes_on = same;
        pieces.push_back({static_cast<Index>(tokens.size()), 1, !first && !same, true});
      }
      tokens.push_back(token);
    }
    s += length;
  }
  return routes;
}

// Tokens [B, T, H, width], float32 or bfloat16, times `scale` when they are read.
struct Heads {
  void* data;
  Index length, heads, width;
  bool wide;  // float32
  float scale;

  Index at(Index row, Index token, Index head) const { return ((row * length + token) * heads + head) * width; }
  // The vector from column c on of the token that begins `at`; zeros past its width.
  Vec read(Index at, Index c) const {
    const Index left = width - c;
    return (wide ? load_part(floats() + at + c, left) : load_part(halves() + at + c, left)) * scale;
  }
  void write(Index at, Index c, Vec x) const {
    const Index left = width - c;
    wide ? store_part(floats() + at + c, x, left) : store_part(halves() + at + c, x, left);
  }
  void prefetch(Index at) const {
    const Index size = wide ? sizeof(float) : sizeof(Bf16);
    const char* from = static_cast<const char*>(data) + at * size;
    for (Index i = 0; i < width * size; i += sizeof(Line)) __builtin_prefetch(from + i);
  }

 private:
  float* floats() const { return static_cast<float*>(data); }
  Bf16* halves() const { return static_cast<Bf16*>(data); }
};

Heads heads_of(const ffi::AnyBuffer& x, float scale = 1) {
  const auto dims = x.dimensions();
  return {x.untyped_data(), dims[1], dims[2], dims[3], x.element_type() == ffi::DataType::F32, scale};
}

// Lightning attention of q, k and v, along the routes.
struct Pass {
  const Routes& routes;
  const float* slopes;  // [H]
  Heads q, k, v, out;
  const float* before;  // the state before each row, [B, H, C, D] or, turned, [B, H, D, C]
  bool turned;
  float* after;  // [B, H, C, D], if anyone asks
  bool late;     // `before` and `after` have decayed one token less, as cotangents of states have
};

// Where a thread works on one head of a row.
struct Workspace {
  const Pass& p;
  const Index row, head, width = p.k.width, columns = whole_panels(p.v.width);
  const Index stride = width + whole_panels(kPiece), depth = width + kPiece;  // of lines, of panels
  float *lines = memory(0, kPiece* stride), *keys = memory(1, kPiece* width), *out = memory(2, kPiece* columns);
  float *across = memory(3, width* whole_panels(kPiece)), *panels = memory(4, depth* columns);
  // exp(-slope i); and that for i = kPiece - 1 to 0, then zeros: the weights of a line's scores are a part of it.
  float *powers = memory(5, kPiece + 1), *weights = memory(6, 2 * whole_panels(kPiece));
  // What is still to be fetched of the next piece, with every tile some of it: the tokens of a head lie too far apart
  // for a processor to foresee.
  const Index* next = nullptr;
  Index missing = 0, each = 0;

  Workspace(const Pass& p, Index row, Index head) : p(p), row(row), head(head) {
    const double slope = p.slopes[head];
    // As near as float32 can be: a state has been multiplied with such a factor for every piece.
    for (int i = 0; i <= kPiece; ++i) powers[i] = static_cast<float>(std::exp(-slope * i));
    std::fill_n(weights, 2 * whole_panels(kPiece), 0.f);
    std::reverse_copy(powers, powers + kPiece, weights);
    const Index tall = ceil_div(kPiece, kRows), panels = columns / kColumns;
    each = ceil_div(kPiece, tall + panels * (tall + ceil_div(width, kRows)));
  }
  // The panel of columns from c on: the state's rows, then the values'.
  float* panel(Index c) const { return panels + c * depth; }
  void fetch() {
    for (Index i = std::min(each, missing); i > 0; --i, --missing, ++next) {
      for (const Heads* x : {&p.q, &p.k, &p.v}) x->prefetch(x->at(row, *next, head));
    }
  }
};

void multiply(float* x, Index count, float factor) {
  for (Index i = 0; i < count; i += kLanes) store_part(x + i, load_part(x + i, count - i) * factor, count - i);
}

void load_state(const Workspace& s, const float* before) {
  const Index values = s.p.v.width;
  for (Index c = 0; c < values; c += kColumns) {
    const Index count = std::min<Index>(kColumns, values - c);
    if (s.p.turned) {
      pack_transposed<float>(before + c * s.width, s.width, s.width, count, s.panel(c));
    } else {
      pack_panels<float>(before + c, values, s.width, count, s.panel(c));
    }
  }
  if (s.p.late) multiply(s.panels, s.depth * s.columns, 1 / s.powers[1]);
}

void store_state(const Workspace& s, float* after) {
  const Index values = s.p.v.width;
  if (s.p.late) multiply(s.panels, s.depth * s.columns, s.powers[1]);
  for (Index i = 0; i < s.width; ++i) {
    for (Index c = 0; c < values; c += kLanes) {
      const float* from = s.panel(c / kColumns * kColumns) + i * kColumns + c % kColumns;
      store_part(after + i * values + c, load(from), values - c);
    }
  }
}

// Fills the lines' left with queries, the keys, and the panels' lower rows with values.
void load_piece(const Workspace& s, const Index* tokens, Index count) {
  const auto& [q, k, v] = std::tie(s.p.q, s.p.k, s.p.v);
  for (Index t = 0; t < count; ++t) {
    const auto at = [&](const Heads& x) { return x.at(s.row, tokens[t], s.head); };
    for (Index c = 0; c < s.width; c += kLanes) {  // a vector's end is overwritten by what follows
      store(s.lines + t * s.stride + c, q.read(at(q), c));
      store(s.keys + t * s.width + c, k.read(at(k), c));
    }
    for (Index c = 0; c < s.columns; c += kLanes) {
      store(s.panel(c / kColumns * kColumns) + (s.width + t) * kColumns + c % kColumns, v.read(at(v), c));
    }
  }
}

// Fills the lines' right with scores, and decays either part.
void weigh_lines(Workspace& s, Index count) {
  pack_transposed<float>(s.keys, s.width, s.width, count, s.across);
  for_tiles(count, [&](Index m, Index height) {
    s.fetch();
    float* lines = s.lines + m * s.stride;
    for (Index c = 0; c < m + height; c += kColumns) {
      kTiles<false>[height - 1](lines, s.stride, s.across + c * s.width, s.width, lines + s.width + c, s.stride,
                                kColumns, Put::kSet);
    }
    for (Index t = m; t < m + height; ++t, lines += s.stride) {
      multiply(lines, s.width, s.powers[t + 1]);
      float* scores = lines + s.width;
      const float* weights = s.weights + kPiece - 1 - t;
      for (Index i = 0; i < m + height; i += kLanes) store(scores + i, load(scores + i) * load(weights + i));
    }
  });
}

// The outputs of a piece, and the state after it.
void multiply_lines(Workspace& s, const Piece& piece) {
  const Index count = piece.count, skipped = piece.fresh ? s.width : 0;
  for (Index t = 0; t < count && piece.goes_on; ++t) {
    multiply(s.keys + t * s.width, s.width, s.powers[count - 1 - t]);
  }
  for (Index c = 0; c < s.columns; c += kColumns) {
    float *state = s.panel(c), *values = state + s.width * kColumns;
    for_tiles(count, [&](Index m, Index height) {
      s.fetch();
      kTiles<false>[height - 1](s.lines + m * s.stride + skipped, s.stride, state + skipped * kColumns,
                                s.width - skipped + m + height, s.out + m * s.columns + c, s.columns, kColumns,
                                Put::kSet);
    });
    if (!piece.goes_on) continue;
    if (!piece.fresh) multiply(state, s.width * kColumns, s.powers[count]);
    for_tiles(s.width, [&](Index m, Index height) {
      s.fetch();
      kTiles<true>[height - 1](s.keys + m, s.width, values, count, state + m * kColumns, kColumns, kColumns,
                               piece.fresh ? Put::kSet : Put::kAdd);
    });
  }
}

void pass_head(const Pass& p, Index row, Index head) {
  Workspace s(p, row, head);
  const Route& route = p.routes[row];
  const Heads& out = p.out;
  const Index state = (row * p.q.heads + head) * p.k.width * p.v.width;
  load_state(s, p.before + state);
  for (const Piece& piece : route.pieces) {
    const Index* tokens = route.tokens.data() + piece.first;
    s.next = tokens + piece.count;
    s.missing = std::min<Index>(kPiece, route.tokens.size() - piece.first - piece.count);
    load_piece(s, tokens, piece.count);
    weigh_lines(s, piece.count);
    multiply_lines(s, piece);
    for (Index t = 0; t < piece.count; ++t) {
      const Index at = out.at(row, tokens[t], head);
      for (Index c = 0; c < out.width; c += kLanes) out.write(at, c, load(s.out + t * s.columns + c));
    }
  }
  for (const Index token : route.padding) {
    const Index at = out.at(row, token, head);
    for (Index c = 0; c < out.width; c += kLanes) out.write(at, c, Vec{});
  }
  if (p.after) store_state(s, p.after + state);
}

// A thread takes a head of a row in one of the passes, those of one head after one another.
ffi::Error pass_all(ffi::ThreadPool& pool, const std::vector<Pass>& passes) {
  const Index count = passes.size(), batch = passes[0].routes.size(), heads = passes[0].q.heads;
  const Index work = count * batch * passes[0].q.length * heads * passes[0].k.width * passes[0].v.width;
  const Index threads = work < (1 << 20) ? 1 : std::max<Index>(1, pool.num_threads());
  parallel(pool, threads, count * batch * heads,
           [&](Index i) { pass_head(passes[i % count], i / count / heads, i / count % heads); });
  return ffi::Error::Success();
}

// ---- handlers ----

ffi::Error lightning_handler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                             ffi::AnyBuffer slopes, ffi::AnyBuffer segments, ffi::AnyBuffer state,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> after, float scale) {
  const Routes forwards = routes_of(segments, false);
  return pass_all(pool, {{forwards, data<float>(slopes), heads_of(q, scale), heads_of(k), heads_of(v), heads_of(*out),
                          data<float>(state), false, data<float>(*after), false}});
}

// dq is a pass over values whose values are keys; dk and dv go through the rows from their ends.
ffi::Error lightning_gradient_handler(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                      ffi::AnyBuffer slopes, ffi::AnyBuffer segments, ffi::AnyBuffer state,
                                      ffi::AnyBuffer g, ffi::AnyBuffer dafter, ffi::Result<ffi::AnyBuffer> dq,
                                      ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                                      ffi::Result<ffi::AnyBuffer> dstate, float scale) {
  const Routes forwards = routes_of(segments, false), backwards = routes_of(segments, true);
  const auto *rates = data<float>(slopes), *last = data<float>(dafter);
  const Heads queries = heads_of(q, scale), keys = heads_of(k), values = heads_of(v), cotangents = heads_of(g);
  return pass_all(
      pool,
      {{forwards, rates, heads_of(g, scale), values, keys, heads_of(*dq), data<float>(state), true, nullptr, false},
       {backwards, rates, keys, queries, cotangents, heads_of(*dv), last, false, data<float>(*dstate), true},
       {backwards, rates, values, cotangents, queries, heads_of(*dk), last, true, nullptr, true}});
}

}  // namespace
