// Grouped matrix products for CPU: rows sorted by group, each group with its own weight. native.py builds and loads it.
//
// Legend: R rows, E groups, I inputs, O outputs, as in grouped.py. Inside, every product is a [M, K] times b [K, N]:
//   product, out_dim 1: M rows, K = I, N = O;  out_dim 2: M rows, K = O, N = I;  weight gradient: M = O, K rows, N = I.
//
// Three ways to multiply, chosen per group:
//   few rows (decoding)     dot products that read each weight once, where it lies
//   float32                 b packed into panels that stay in cache, a tile of sums in registers
//   bfloat16                the same after widening to float32, or Intel's AMX tiles where this machine has them
// Weights are cast to the rows' type first, and sums are float32, as in the other implementations.

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

#include "native_amx.h"
#include "native_vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A tile of sums is kRows x kColumns and leaves registers for b and for one element of a: 14 x 2 of 32 registers with
// AVX-512, 6 x 2 of 16 with AVX2. A panel of b is kDepth deep: 16 KB (32 KB with AVX-512) of the first cache; kWidth
// columns of it take 256 KB of the second.
constexpr int kColumns = 2 * kLanes;
#if defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = kLanes == 16 ? 14 : 6;
#endif
constexpr Index kDepth = 256;
constexpr Index kChunk = 128;   // rows of a, or some more or less, that meet all panels before the next
constexpr Index kFew = kLanes;  // rows up to which neither x nor w is packed
constexpr Index kSome = 256;    // rows up to which x is packed and not w
constexpr Index kAhead = 8192;  // bytes between what is read and what is asked for
constexpr Index kMost = 1024;   // rows of one item of work

// ---- float32 tiles ----

// What becomes of a tile's sums; kPast: past the caches, of whole tiles on vectors' boundaries.
enum class Put { kSet, kAdd, kPast };

// c [M, columns] = a b (+ c). b: a panel, [depth, kColumns]. a: rows `lda` apart; with kPacked a^T's are.
template <int M, bool kPacked>
void multiply_tile(const float* a, Index lda, const float* b, Index depth, float* c, Index ldc, Index columns,
                   Put put) {
  Vec sums[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Vec{};
  constexpr int kBases = (M + 2) / 3;  // an address is a base plus 0, 1 or 2 strides: few registers, no copy of a
  const float* bases[kBases];
  for (int i = 0; i < kBases; ++i) bases[i] = a + 3 * i * lda;
  for (Index k = 0; k < depth; ++k, b += kColumns) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float x = kPacked ? a[m] : bases[m / 3][m % 3 * lda];
      sums[m][0] += b0 * x;
      sums[m][1] += b1 * x;
    }
    a += lda;
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) ++bases[i];
  }
  if (put == Put::kPast) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) stream(c + m * ldc, sums[m][0]), stream(c + m * ldc + kLanes, sums[m][1]);
    return;
  }
  float parts[M * kColumns];
  const bool whole = columns == kColumns, add = put == Put::kAdd;
  float* to = whole ? c : parts;
  const Index stride = whole ? ldc : kColumns;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    float *left = to + m * stride, *right = left + kLanes;
    store(left, add && whole ? sums[m][0] + load(left) : sums[m][0]);
    store(right, add && whole ? sums[m][1] + load(right) : sums[m][1]);
  }
  for (int m = 0; m < M && !whole; ++m) {
    for (int n = 0; n < columns; ++n) c[m * ldc + n] = parts[m * kColumns + n] + (add ? c[m * ldc + n] : 0);
  }
}

using Tile = decltype(&multiply_tile<1, true>);
template <bool kPacked, int... M>
constexpr std::array<Tile, sizeof...(M)> tiles_of(std::integer_sequence<int, M...>) {
  return {multiply_tile<M + 1, kPacked>...};
}
template <bool kPacked>
constexpr auto kTiles = tiles_of<kPacked>(std::make_integer_sequence<int, kRows>());

// Splits `total` into `count` nearly equal parts: calls each(first, size).
template <typename F>
void for_parts(Index total, Index count, const F& each) {
  for (Index i = 0; i < count; ++i) {
    const Index first = i * total / count;
    each(first, (i + 1) * total / count - first);
  }
}

// Splits `rows` into tiles of nearly equal height, none of them small: calls each(first, height).
template <typename F>
void for_tiles(Index rows, const F& each) {
  for_parts(rows, ceil_div(rows, kRows), each);
}

// c = a b for packed panels of b: each panel meets every tile of a while it is in the first cache.
template <bool kPacked>
void multiply_panels(const float* a, Index lda, const float* b, Index depth, float* c, Index ldc, Index rows,
                     Index columns, Put put) {
  for (Index n = 0; n < columns; n += kColumns) {
    for_tiles(rows, [&](Index m, Index height) {
      const float* from = a + m * (kPacked ? depth : lda);
      const auto tile = kTiles<kPacked>[height - 1];
      tile(from, kPacked ? height : lda, b + n * depth, depth, c + m * ldc + n, ldc,
           std::min<Index>(columns - n, kColumns), put);
    });
  }
}

// Panels of w [depth, columns], rows `stride` apart.
template <typename X, typename W>
void pack_panels(const W* w, Index stride, Index depth, Index columns, float* to) {
  for (Index n = 0; n < columns; n += kColumns) {
    for (Index k = 0; k < depth; ++k, to += kColumns) {
      const W* from = w + k * stride + n;
      store(to, load_cast<X>(from, columns - n));
      store(to + kLanes, load_cast<X>(from + kLanes, columns - n - kLanes));
    }
  }
}

// Panels of the transpose of w [columns, depth], rows `stride` apart.
template <typename X, typename W>
void pack_transposed(const W* w, Index stride, Index depth, Index columns, float* to) {
  for (Index n = 0; n < columns; n += kLanes) {
    float* panel = to + n / kColumns * kColumns * depth + n % kColumns;
    for (Index k = 0; k < depth; k += kLanes) {
      const W* from = w + n * stride + k;
      Vec block[kLanes];
      if (columns - n >= kLanes && depth - k >= kLanes) {  // apart, since it is a quarter faster
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load_cast<X>(from + i * stride, kLanes);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kColumns, block[i]);
        continue;
      }
      for (Index i = 0; i < kLanes; ++i) {
        block[i] = n + i < columns ? load_cast<X>(from + i * stride, depth - k) : Vec{};
      }
      transpose(block);
      for (Index i = 0; i < std::min<Index>(kLanes, depth - k); ++i) store(panel + (k + i) * kColumns, block[i]);
    }
  }
  if (ceil_div(columns, kLanes) % 2) {  // the last panel's other half
    float* panel = to + columns / kColumns * kColumns * depth + kLanes;
    for (Index k = 0; k < depth; ++k) store(panel + k * kColumns, Vec{});
  }
}

// The tiles of g^T, g [depth, rows] with rows `stride` apart: each [depth, height].
template <typename X>
void pack_tiles(const X* g, Index stride, Index depth, Index rows, float* to) {
  for_tiles(rows, [&](Index m, Index height) {
    for (Index k = 0; k < depth; ++k) {
      // Whole vectors: what is too much is overwritten by the next.
      for (Index i = 0; i < height; i += kLanes) {
        store(to + m * depth + k * height + i, load_part(g + k * stride + m + i, rows - m - i));
      }
    }
  });
}

// ---- one item of work ----

// The lanes' partial sums of x . w, `inner` long.
template <typename X, typename W>
inline Vec partial_sums(const X* x, const W* w, Index inner) {
  Vec sums[4] = {};
  Index k = 0;
  for (; k + 4 * kLanes <= inner; k += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += load(x + k + i * kLanes) * load_cast<X>(w + k + i * kLanes, kLanes);
  }
  for (; k < inner; k += kLanes) sums[0] += load_part(x + k, inner - k) * load_cast<X>(w + k, inner - k);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// How a strip of w's rows meets R rows of x: so many sums fill one vector, from `kAcross` rows of w at a time, each in
// `kSplits` parts: eight sums or so are under way at once.
template <int R>
struct Strip {
  static constexpr int kPadded = R < 3 ? R : 4, kOutputs = kLanes / kPadded;
  static constexpr int kAcross = std::min(R == 1 ? 1 : 2, kOutputs), kSplits = R == 1 ? 4 : R == 2 ? 2 : 1;
};

// The lanes' partial sums of R rows of x with kAcross of w, into sums[r * kOutputs + o].
template <int R, typename X, typename W>
inline void few_sums(const float* x, Index inner, const W* const* w, Vec* sums) {
  using S = Strip<R>;
  Vec parts[S::kSplits][S::kAcross][R] = {};
  const auto add = [&](Index k, int part, Index left) {
    Vec rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rows[r] = load_part(x + r * inner + k, left);
#pragma GCC unroll 4
    for (int o = 0; o < S::kAcross; ++o) {
      const Vec column = load_cast<X>(w[o] + k, left);
      __builtin_prefetch(w[o] + k + kAhead / sizeof(W), 0, 0);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) parts[part][o][r] += rows[r] * column;
    }
  };
  Index k = 0;
  for (; k + S::kSplits * kLanes <= inner; k += S::kSplits * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < S::kSplits; ++part) add(k + part * kLanes, part, kLanes);
  }
  for (; k < inner; k += kLanes) add(k, 0, inner - k);
#pragma GCC unroll 4
  for (int o = 0; o < S::kAcross; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec sum = parts[0][o][r];
#pragma GCC unroll 4
      for (int part = 1; part < S::kSplits; ++part) sum += parts[part][o][r];
      sums[r * S::kOutputs + o] = sum;
    }
  }
}

// y[r, n] = x_r . w_n of R rows of x and a strip of w's, of which there are `count`.
template <int R, typename X, typename W>
inline void few_strip(const float* x, const W* w, Index inner, X* y, Index stride, Index count) {
  using S = Strip<R>;
  Vec sums[kLanes] = {};
#pragma GCC unroll 16
  for (int o = 0; o < S::kOutputs; o += S::kAcross) {
    const W* from[S::kAcross];
    for (int i = 0; i < S::kAcross; ++i) from[i] = w + std::min<Index>(o + i, count - 1) * inner;
    few_sums<R, X>(x, inner, from, sums + o);
  }
  X results[kLanes];
  store(results, sums_of_lanes(sums));
  for (int r = 0; r < R; ++r) {
    std::memcpy(y + r * stride, results + r * S::kOutputs, std::min<Index>(S::kOutputs, count) * sizeof(X));
  }
}

// `count` elements as float32: themselves, or in this thread's memory.
inline const float* widened(const float* x, Index) { return x; }
inline const float* widened(const Bf16* x, Index count) {
  float* wide = scratch<float>(kA, count + kLanes);
  for (Index i = 0; i < count; i += kLanes) store(wide + i, load_part(x + i, count - i));
  return wide;
}

// As product_tiles for w [N, K] and at most kFew rows.
template <typename X, typename W>
void product_few(const Shape& s, const X* x, const W* w, X* y, Index rows, Index first, Index last) {
  const float* a = widened(x, rows * s.inner);
  const auto strips = [&](auto height, Index row, Index begin, Index end) {
    constexpr int R = decltype(height)::value;
    constexpr Index kOutputs = Strip<R>::kOutputs;
    for (Index n = begin; n < end; n += kOutputs) {
      few_strip<R>(a + row * s.inner, w + n * s.inner, s.inner, y + row * s.outer + n, s.outer,
                   std::min(kOutputs, end - n));
    }
  };
  for (Index n = first; n < last; n += kLanes) {  // these rows of w stay in the first cache for all of x
    const Index end = std::min<Index>(n + kLanes, last);
    for_parts(rows, ceil_div(rows, 4), [&](Index r, Index height) {
      switch (height) {
        case 1:
          return strips(std::integral_constant<int, 1>(), r, n, end);
        case 2:
          return strips(std::integral_constant<int, 2>(), r, n, end);
        case 3:
          return strips(std::integral_constant<int, 3>(), r, n, end);
        default:
          return strips(std::integral_constant<int, 4>(), r, n, end);
      }
    });
  }
}

// As product_tiles for w [N, K] and rows that packing w does not pay for: x is packed instead, and y^T = w x^T.
template <typename X, typename W>
void product_across(const Shape& s, const X* x, const W* w, X* y, Index rows, Index first, Index last) {
  constexpr Index kOutputs = 10 * kRows;  // of w's rows at a time, which stay in the second cache for all of x
  const Index columns = ceil_div(rows, kColumns) * kColumns;
  float* b = scratch<float>(kB, columns * s.inner);
  float* c = scratch<float>(kC, (kOutputs + kLanes) * columns);
  constexpr bool kAsItLies = std::is_same_v<X, float> && std::is_same_v<W, float>;
  float* wide = kAsItLies ? nullptr : scratch<float>(kA, kOutputs * s.inner + kLanes);
  for (Index k = 0; k < s.inner; k += kDepth) {
    pack_transposed<X>(x + k, s.inner, std::min(kDepth, s.inner - k), rows, b + k * columns);
  }
  for (Index n = first; n < last; n += kOutputs) {
    const Index height = std::min(kOutputs, last - n);
    const float* some;
    if constexpr (kAsItLies) {
      some = w + n * s.inner;
    } else {
      for (Index i = 0, count = height * s.inner; i < count; i += kLanes) {
        store(wide + i, load_cast<X>(w + n * s.inner + i, count - i));
      }
      some = wide;
    }
    for (Index k = 0; k < s.inner; k += kDepth) {
      const Index depth = std::min(kDepth, s.inner - k);
      multiply_panels<false>(some + k, s.inner, b + k * columns, depth, c, columns, height, columns,
                             k > 0 ? Put::kAdd : Put::kSet);
    }
    for (Index m = 0; m < height; m += kLanes) {
      for (Index r = 0; r < rows; r += kLanes) {
        Vec block[kLanes];
        for (Index i = 0; i < kLanes; ++i) block[i] = load(c + (m + i) * columns + r);
        transpose(block);
        for (Index i = 0; i < std::min<Index>(kLanes, rows - r); ++i) {
          store_part(y + (r + i) * s.outer + n + m, block[i], height - m);
        }
      }
    }
  }
}

// y[:, first:last] = x w for `rows` rows of a group.
template <typename X, typename W>
void product_tiles(const Shape& s, const X* x, const W* w, X* y, Index rows, Index first, Index last) {
  constexpr bool kWide = std::is_same_v<X, float>;
  const Index chunks = std::max<Index>(1, (rows + kChunk / 2) / kChunk), most = ceil_div(rows, chunks);
  float* b = scratch<float>(kB, kDepth * (kWidth + kColumns));
  for (Index n = first; n < last; n += kWidth) {
    const Index columns = std::min(kWidth, last - n);
    float* sums = kWide ? nullptr : scratch<float>(kC, (s.inner > kDepth ? rows : most) * columns);
    for (Index k = 0; k < s.inner; k += kDepth) {
      const Index depth = std::min(kDepth, s.inner - k);
      const Put put = k > 0 ? Put::kAdd : Put::kSet;
      if (s.transposed) {
        pack_transposed<X>(w + n * s.inner + k, s.inner, depth, columns, b);
      } else {
        pack_panels<X>(w + k * s.outer + n, s.outer, depth, columns, b);
      }
      for_parts(rows, chunks, [&](Index m, Index height) {
        const X* from = x + m * s.inner + k;
        X* to = y + m * s.outer + n;
        if constexpr (kWide) {
          multiply_panels<false>(from, s.inner, b, depth, to, s.outer, height, columns, put);
        } else {
          float* a = scratch<float>(kA, most * kDepth + kLanes);
          for (Index r = 0; r < height; ++r) {
            for (Index i = 0; i < depth; i += kLanes) {
              store(a + r * depth + i, load_part(from + r * s.inner + i, depth - i));
            }
          }
          float* c = s.inner > kDepth ? sums + m * columns : sums;
          multiply_panels<false>(a, depth, b, depth, c, columns, height, columns, put);
          for (Index r = 0; r < height && k + kDepth >= s.inner; ++r) {
            for (Index i = 0; i < columns; i += kLanes) {
              store_part(to + r * s.outer + i, load_part(c + r * columns + i, columns - i), columns - i);
            }
          }
        }
      });
    }
  }
}

// dw[:, first:last] = g^T x over `rows` rows of a group; dw is [outputs, inputs], rows of g lie `stride` apart. What is
// written once, and read when all gradients are there, goes past the caches.
template <typename X>
void gradient_tiles(const X* g, Index stride, const X* x, float* dw, Index rows, Index outputs, Index inputs,
                    Index first, Index last) {
  float* a = scratch<float>(kA, kDepth * kWidth + kLanes);
  float* b = scratch<float>(kB, kDepth * (kWidth + kColumns));
  const bool past = rows <= kDepth && inputs % kLanes == 0 && (last - first) % kColumns == 0 && can_stream(dw + first);
  for (Index n = first; n < last; n += kWidth) {
    const Index columns = std::min(kWidth, last - n);
    for (Index m = 0; m < outputs; m += kWidth) {
      const Index height = std::min(kWidth, outputs - m);
      for_parts(rows, ceil_div(rows, kDepth), [&](Index r, Index depth) {
        pack_tiles(g + r * stride + m, stride, depth, height, a);
        pack_panels<X>(x + r * inputs + n, inputs, depth, columns, b);
        const Put put = r > 0 ? Put::kAdd : past ? Put::kPast : Put::kSet;
        multiply_panels<true>(a, 0, b, depth, dw + m * inputs + n, inputs, height, columns, put);
      });
    }
  }
  if (past) end_stream();
}

// ---- work for all threads ----

// The rule: a result depends on inputs and, where items are cut for so many threads, on their number; never on which
// thread takes a part. Two compiled copies of `a * b + c * d` may fuse differently and then differ in the last bit, so
// the work of every kernel is compiled once and called by its address. `parallel` sees to that, and all kernels go
// through it: nothing else hands work to other threads.

using Call = void (*)(const void* work, Index part);

template <typename F>
void call(const void* work, Index part) {
  (*static_cast<const F*>(work))(part);
}

#if defined(LING_TURNS)  // by the tests, which say who takes the parts
}  // namespace

// Who: this thread (0), another (1), the two in turn (2). How much work was for one thread, for more, in what parts.
struct Turns {
  std::int64_t who, alone, shared, parts;
};
extern "C" {
__attribute__((visibility("default"))) Turns ling_turns;
}

namespace {

void share(ffi::ThreadPool&, Index threads, Index count, Call call, const void* work, bool) {
  const bool alone = std::min(threads, count) <= 1;
  ++(alone ? ling_turns.alone : ling_turns.shared);
  ling_turns.parts += alone ? 0 : count;
  const auto take = [=, who = alone ? 0 : ling_turns.who](Index thread) {
    for (Index i = 0; i < count; ++i) {
      if ((who == 2 ? i % 2 : who) == thread) call(work, i);
    }
  };
  std::thread other(take, 1);
  take(0);
  other.join();
}
#else
struct Job {
  Call call;
  const void* work;
  Index count;
  bool more_soon;
  std::atomic<Index> next{0}, done{0};

  void take_parts() {
    for (Index i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      call(work, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where threads of the pool wait for the next job before they go. Decoding is short work with short gaps, in which the
// pool's threads would fall asleep; to wake one takes longer than half of such work.
class Lobby {
 public:
  // Makes a job known to those who wait; returns how many there are.
  Index announce(const std::shared_ptr<Job>& job) {
    if (waiting_.load(std::memory_order_acquire) == 0) return 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = job;
    ticket_.fetch_add(1, std::memory_order_release);
    return waiting_.load(std::memory_order_relaxed);
  }

  // Takes parts of `job`, then of others as long as they come soon.
  void work(std::shared_ptr<Job> job) {
    using Clock = std::chrono::steady_clock;
    while (job != nullptr) {
      std::uint64_t seen = ticket_.load(std::memory_order_acquire);
      const bool stay = job->more_soon;
      job->take_parts();
      job = nullptr;
      if (!stay) return;
      const auto until = Clock::now() + std::chrono::microseconds(200);
      waiting_.fetch_add(1, std::memory_order_acq_rel);
      for (int spins = 1; job == nullptr && (spins % 64 > 0 || Clock::now() < until); ++spins) {
        if (ticket_.load(std::memory_order_acquire) != seen) {
          const std::lock_guard<std::mutex> lock(mutex_);
          seen = ticket_.load(std::memory_order_relaxed);
          job = job_.lock();
        }
        pause();
      }
      waiting_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

 private:
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<Index> waiting_{0};
  std::mutex mutex_;
  std::weak_ptr<Job> job_;
};

// Calls call(work, i) once for each i < count, on this thread and on those of XLA's pool that come in time. What a late
// one touches is only the job's counters: this thread may itself be one of the pool's, and must never wait for a free
// one.
void share(ffi::ThreadPool& pool, Index threads, Index count, Call call, const void* work, bool more_soon) {
  static Lobby* const lobby = new Lobby;  // threads may be in it when the process ends
  const auto job = std::make_shared<Job>();
  job->call = call, job->work = work, job->count = count, job->more_soon = more_soon;
  const Index helpers = std::min(threads, count) - 1;
  for (Index i = helpers > 0 ? lobby->announce(job) : 0; i < helpers; ++i) {
    pool.Schedule([job] { lobby->work(job); });
  }
  job->take_parts();
  for (int spins = 0; job->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}
#endif

// Calls work(i) once for each i < count, on so many threads at most; says whether the next such work will come soon, as
// in a step of decoding.
template <typename F>
void parallel(ffi::ThreadPool& pool, Index threads, Index count, const F& work, bool more_soon = false) {
  Call any = call<F>;
  asm volatile("" : "+r"(any));  // the compiler must not know which function this is: it would inline or clone it
  share(pool, threads, count, any, &work, more_soon);
}

struct Item {
  Index group, row, rows, first, last;  // rows of a group times columns first to last; group -1: past the last one
};

// Groups' rows, never more than there are: a hostile size must not write elsewhere.
std::vector<Item> groups_of(ffi::AnyBuffer sizes, Index room, Index columns) {
  const auto* size = static_cast<const std::int32_t*>(sizes.untyped_data());
  std::vector<Item> items;
  Index row = 0;
  for (Index e = 0; e < static_cast<Index>(sizes.element_count()); ++e) {
    const Index rows = std::clamp<Index>(size[e], 0, room - row);
    items.push_back({e, row, rows, 0, columns});
    row += rows;
  }
  items.push_back({-1, row, room - row, 0, columns});
  return items;
}

// Cuts item's columns into at most `pieces` of 64 or more.
void add_pieces(std::vector<Item>& to, Item item, Index pieces) {
  const Index last = item.last, width = ceil_div(ceil_div(last, std::max<Index>(1, pieces)), 64) * 64;
  for (item.first = 0; item.first < last; item.first += width) {
    item.last = std::min(last, item.first + width);
    to.push_back(item);
  }
}

// Four items a thread or more, where there is enough to do, so that threads end together though groups are unequal.
std::vector<Item> product_items(const std::vector<Item>& groups, Index threads) {
  const Index inside = groups.back().row;
  const Index most = threads == 1 ? kMost : std::clamp(inside / (8 * threads), kChunk, kMost);
  std::vector<Item> chunks, items;
  for (const Item& group : groups) {
    const Index count = ceil_div(group.rows, most);
    for (Index i = 0; i < count; ++i) {
      const Index begin = i * group.rows / count, end = (i + 1) * group.rows / count;
      chunks.push_back({group.group, group.row + begin, end - begin, 0, group.last});
    }
  }
  const Index missing = ceil_div(4 * threads, std::max<Index>(1, chunks.size()));
  for (const Item& chunk : chunks) add_pieces(items, chunk, chunk.group < 0 || threads == 1 ? 1 : missing);
  return items;
}

std::vector<Item> gradient_items(const std::vector<Item>& groups, Index threads) {
  const Index inside = std::max<Index>(1, groups.back().row);
  std::vector<Item> items;
  for (const Item& group : groups) {
    if (group.group >= 0) add_pieces(items, group, threads == 1 ? 1 : ceil_div(8 * threads * group.rows, inside));
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.rows > b.rows; });
  return items;
}

// All of the pool, or this thread alone when waking another takes longer than the work.
Index threads_for(const ffi::ThreadPool& pool, const std::vector<Item>& groups, Index weight) {
  const Index used = std::count_if(groups.begin(), groups.end() - 1, [](const Item& group) { return group.rows > 0; });
  const bool small = groups.back().row * weight < (1 << 19) && used * weight < (1 << 15);  // some 10 microseconds
  return small ? 1 : std::max<Index>(1, pool.num_threads());
}

// y[:, first:last] = x w for `rows` rows of a group, the best way here.
template <typename X, typename W>
void product_item(const Shape& s, const X* x, const W* w, X* y, Index rows, Index first, Index last) {
  if (s.transposed && rows <= kFew) return product_few(s, x, w, y, rows, first, last);
#if defined(LING_AMX)
  if constexpr (std::is_same_v<X, Bf16>) {
    if (amx_allowed()) return product_amx(s, x, w, y, rows, first, last);
  }
#endif
  if (s.transposed && rows <= kSome) return product_across(s, x, w, y, rows, first, last);
  product_tiles(s, x, w, y, rows, first, last);
}

// dw[:, first:last] = g^T x over an item's rows; those of g lie `stride` apart.
template <typename X>
void gradient_item(const X* g, Index stride, const X* x, float* dw, const Item& t, Index outputs, Index inputs) {
  if (t.rows == 0) {  // whole: only groups with rows are cut
    std::memset(dw, 0, outputs * inputs * sizeof(float));
    return;
  }
#if defined(LING_AMX)
  if constexpr (std::is_same_v<X, Bf16>) {
    if (amx_allowed()) return gradient_amx(g, stride, x, dw, t.rows, outputs, inputs, t.first, t.last);
  }
#endif
  gradient_tiles(g, stride, x, dw, t.rows, outputs, inputs, t.first, t.last);
}

// Whether so many rows are those of a step of decoding.
bool few_in_all(const std::vector<Item>& groups) { return groups.back().row <= 512; }

// Calls multiply(item, where its results go) for all items of groups' rows times weights; zeros past the last group.
template <typename X, typename F>
void each_product(ffi::ThreadPool& pool, const Shape& s, X* y, const std::vector<Item>& groups, const F& multiply) {
  const Index threads = threads_for(pool, groups, s.inner * s.outer);
  const auto items = product_items(groups, threads);
  const auto work = [&](Index i) {
    const Item& t = items[i];
    X* to = y + t.row * s.outer;
    if (t.group >= 0) return multiply(t, to);
    std::memset(to, 0, t.rows * s.outer * sizeof(X));
  };
  parallel(pool, threads, items.size(), work, few_in_all(groups));
}

template <typename X, typename W>
void product(ffi::ThreadPool& pool, const Shape& s, const X* x, const W* w, X* y, const std::vector<Item>& groups) {
  each_product(pool, s, y, groups, [&](const Item& t, X* to) {
    product_item(s, x + t.row * s.inner, w + t.group * s.inner * s.outer, to, t.rows, t.first, t.last);
  });
}

// The gradient of one weight, cut across its longer side: what is packed is packed as seldom as can be.
template <typename X>
void gradient_of_one(ffi::ThreadPool& pool, Index threads, const X* g, const X* x, float* dw, Index outputs,
                     Index inputs, const Item& all) {
  const bool tall = outputs >= inputs;
  const Index longer = std::max(outputs, inputs), pieces = std::max(threads, ceil_div(longer, kWidth));
  const Index width = ceil_div(ceil_div(longer, pieces), 32) * 32;
  parallel(pool, threads, ceil_div(longer, width), [&](Index i) {
    const Index begin = i * width, end = std::min(longer, begin + width);
    Item t = all;
    if (!tall) t.first = begin, t.last = end;
    const Index skipped = tall ? begin : 0;
    gradient_item(g + skipped, outputs, x, dw + skipped * inputs, t, tall ? end - begin : outputs, inputs);
  });
}

template <typename X>
void gradient(ffi::ThreadPool& pool, const X* g, const X* x, float* dw, Index outputs, Index inputs,
              const std::vector<Item>& groups) {
  const Index threads = threads_for(pool, groups, outputs * inputs);
  if (groups.size() == 2 && groups[0].rows > 0) {
    return gradient_of_one(pool, threads, g, x, dw, outputs, inputs, groups[0]);
  }
  const auto items = gradient_items(groups, threads);
  parallel(pool, threads, items.size(), [&](Index i) {
    const Item& t = items[i];
    gradient_item(g + t.row * outputs, outputs, x + t.row * inputs, dw + t.group * outputs * inputs, t, outputs,
                  inputs);
  });
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// Where in a stack [L, ...] a layer's part begins; of a stack of one it is that one's.
Index part_of(const ffi::AnyBuffer& stack, const ffi::AnyBuffer& layer) {
  const Index layers = stack.dimensions()[0], part = stack.element_count() / std::max<Index>(1, layers);
  return std::clamp<Index>(*data<const std::int32_t>(layer), 0, layers - 1) * part;
}

// Calls f with a pointer of the buffer's type.
template <typename F>
ffi::Error with_type(const ffi::AnyBuffer& buffer, const F& f) {
  if (buffer.element_type() == ffi::DataType::F32) return f(static_cast<float*>(buffer.untyped_data()));
  if (buffer.element_type() == ffi::DataType::BF16) return f(static_cast<Bf16*>(buffer.untyped_data()));
  return ffi::Error::InvalidArgument("neither float32 nor bfloat16");
}

// Which of w's weights [G, ...] is that of the first group.
Index first_of(const ffi::AnyBuffer& w, const ffi::AnyBuffer& sizes, const ffi::AnyBuffer& first) {
  const Index most = w.dimensions()[0] - static_cast<Index>(sizes.element_count());
  return std::clamp<Index>(*data<const std::int32_t>(first), 0, std::max<Index>(0, most));
}

// The groups' weights are those from `first` on.
ffi::Error product_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                           ffi::AnyBuffer first, ffi::Result<ffi::AnyBuffer> y, std::int64_t out_dim) {
  const Shape shape{x.dimensions()[1], y->dimensions()[1], out_dim == 1};
  const auto groups = groups_of(sizes, x.dimensions()[0], shape.outer);
  const Index skipped = first_of(w, sizes, first) * shape.inner * shape.outer;
  return with_type(x, [&](auto* rows) {
    return with_type(w, [&](auto* weights) {
      product(pool, shape, rows, weights + skipped, static_cast<decltype(rows)>(y->untyped_data()), groups);
      return ffi::Error::Success();
    });
  });
}

ffi::Error gradient_handler(ffi::ThreadPool pool, ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer sizes,
                            ffi::Result<ffi::AnyBuffer> dw) {
  const Index outputs = g.dimensions()[1], inputs = x.dimensions()[1];
  const auto groups = groups_of(sizes, x.dimensions()[0], inputs);
  return with_type(x, [&](auto* rows) {
    const auto* left = static_cast<decltype(rows)>(g.untyped_data());
    gradient(pool, left, rows, static_cast<float*>(dw->untyped_data()), outputs, inputs, groups);
    return ffi::Error::Success();
  });
}

// A binding can be neither copied nor moved: each step returns the next one's own.
template <int kArgs, int kResults, typename Binding>
auto take(Binding&& binding) {
  if constexpr (kArgs > 0) {
    return take<kArgs - 1, kResults>(std::move(binding).template Arg<ffi::AnyBuffer>());
  } else if constexpr (kResults > 1) {
    return take<0, kResults - 1>(std::move(binding).template Ret<ffi::AnyBuffer>());
  } else {
    return std::move(binding).template Ret<ffi::AnyBuffer>();
  }
}

// XLA's threads, then so many arrays taken and given.
template <int kArgs, int kResults>
auto arrays() {
  return take<kArgs, kResults>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>());
}

}  // namespace

#include "native_adamw.h"
#include "native_attention.h"  // made of the tiles above
#include "native_cached.h"     // made of parts of attention
#include "native_experts.h"    // made of the items above, and an exponential of attention's
#include "native_fp8.h"        // made of the items above
#include "native_lightning.h"  // made of the tiles above, and attention's memory and exponential
#include "native_router.h"

// All else is hidden: another library may hold another version of XLA's headers.
extern "C" {
__attribute__((visibility("default"))) XLA_FFI_Error* LingGroupedProduct(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingGroupedWeightGradient(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingAttention(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingAttentionGradient(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingLightning(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingLightningGradient(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingCachedAttention(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingExperts(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingExpertsGradient(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingEmpty(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingAdamW(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingChoose(XLA_FFI_CallFrame*);
__attribute__((visibility("default"))) XLA_FFI_Error* LingFp8Product(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(LingGroupedProduct, product_handler, (arrays<4, 1>().Attr<std::int64_t>("out_dim")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingGroupedWeightGradient, gradient_handler, (arrays<3, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingAttention, attention_handler,
                              (arrays<5, 2>().Attr<float>("scale").Attr<bool>("causal")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingAttentionGradient, attention_gradient_handler,
                              (arrays<8, 3>().Attr<float>("scale").Attr<bool>("causal")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingLightning, lightning_handler, (arrays<6, 2>().Attr<float>("scale")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingLightningGradient, lightning_gradient_handler, (arrays<8, 4>().Attr<float>("scale")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingCachedAttention, cached_handler, (arrays<5, 1>().Attr<float>("scale")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingExperts, experts_handler, (arrays<9, 4>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingExpertsGradient, experts_gradient_handler, (arrays<13, 9>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingEmpty, empty_handler, (arrays<0, 1>().Attr<std::int64_t>("number")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LingAdamW, adamw_handler,
    (arrays<5, 3>().Attr<float>("b1").Attr<float>("b2").Attr<float>("eps").Attr<float>("decay")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingChoose, choose_handler,
                              (arrays<1, 1>().Attr<std::int64_t>("groups").Attr<std::int64_t>("open")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(LingFp8Product, fp8_product_handler, (arrays<5, 1>()));
