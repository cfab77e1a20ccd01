// Batch normalization on a CPU: Algorithm 1 of https://arxiv.org/abs/1502.03167 and its gradient.
//
// Two ways to walk an array of shape (L, C, S). By rows, if S is long: the elements of a channel
// are L runs of S neighbours, and one thread takes a channel whole, so that what it has just
// summed is still in its cache when it writes. By columns, if S is short (dense layers and
// channels-last: S = 1): the array is a matrix of L rows and C * S columns, every loop runs along
// a row, and the S columns of a channel are put together at the end.
//
// Sums are taken over blocks that fit the first-level cache, in T, and added up in double.

#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace scratchbn {

// An array seen as L positions before the channel axis, C channels, S positions after it.
struct View {
  int64_t L, C, S;
  int64_t m() const { return L * S; }  // elements of one channel
};

// Everything one call needs; arrays per channel have C elements.
template <typename T>
struct Layer {
  View view;
  double epsilon;
  bool relu;
  const T* x;
  const T* gamma;  // null: treated as 1
  const T* beta;   // null: treated as 0
};

// What the forward keeps for the backward. `shift` is the mean as T can hold it and `rest` what
// rounding left of it, so that x - mean is (x - shift) - rest without loss at any mean.
template <typename T>
struct Normalizer {
  T* shift;
  T* rest;
  T* inverse_std;
};

constexpr int64_t kShortRun = 16;         // S below this: by columns
constexpr int64_t kBlock = 2048;          // elements summed in T before they are added in double
constexpr int64_t kWorthThreads = 16384;  // elements below which a second thread costs more

// Mean and sum of squared deviations of n values; merging two is exact in real numbers
// (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm", 1979). The mean is
// measured from an element of the channel, so that it is small and merging is exact in double.
struct Moments {
  double n = 0, mean = 0, squares = 0;

  void merge(double other_n, double other_mean, double other_squares) {
    const double total = n + other_n;
    if (total == 0) return;
    const double gap = other_mean - mean;
    squares += other_squares + gap * gap * (n * other_n / total);
    mean += gap * (other_n / total);
    n = total;
  }
};

// What an element of a channel is transformed with.
template <typename T>
struct Affine {
  T shift, factor, offset;

  template <typename V>
  V operator()(V x) const {
    return (x - shift) * factor + offset;
  }
};

template <typename T, typename V>
inline V relu(V z) {
  return z <= T(0) ? V{} : z;  // NaN stays NaN
}

template <typename T, typename V>
inline V relu_gradient(V z, V dy) {
  return z > T(0) ? dy : (z == z ? V{} : z);
}

// --- runs of neighbours ------------------------------------------------------------------------

#ifdef __AVX__
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T, typename V>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Calls f(V{}, i) for i = 0, w, 2w, ... with vectors V of width w, and with single values at the end.
template <typename T, typename F>
inline void along(int64_t n, F f) {
  constexpr int64_t w = kVectorBytes / sizeof(T);
  int64_t i = 0;
  for (; i + w <= n; i += w) f(Vector<T>{}, i);
  for (; i < n; ++i) f(T{}, i);
}

// Adds up K terms, each a function of the position, along a run. Four vectors take turns, so that
// one addition need not wait for the one before.
template <typename T, int K, typename F>
class Sums {
 public:
  explicit Sums(F terms) : terms_(terms) {}

  void run(int64_t begin, int64_t n) {
    constexpr int64_t w = kVectorBytes / sizeof(T);
    int64_t i = begin;
    const int64_t end = begin + n;
    for (; i + 4 * w <= end; i += 4 * w) {
      for (int j = 0; j < 4; ++j) add(vectors_[j], terms_(Vector<T>{}, i + j * w));
    }
    for (; i + w <= end; i += w) add(vectors_[0], terms_(Vector<T>{}, i));
    for (; i < end; ++i) add(single_, terms_(T{}, i));
  }

  std::array<T, K> total() const {
    std::array<T, K> sum = single_;
    for (int k = 0; k < K; ++k) {
      const Vector<T> v = (vectors_[0][k] + vectors_[1][k]) + (vectors_[2][k] + vectors_[3][k]);
      for (size_t i = 0; i < kVectorBytes / sizeof(T); ++i) sum[k] += v[i];
    }
    return sum;
  }

 private:
  template <typename V>
  static void add(std::array<V, K>& to, const std::array<V, K>& terms) {
    for (int k = 0; k < K; ++k) to[k] += terms[k];
  }

  F terms_;
  std::array<Vector<T>, K> vectors_[4] = {};
  std::array<T, K> single_ = {};
};

template <typename T, int K, typename F>
Sums<T, K, F> sums(F terms) {
  return Sums<T, K, F>(terms);
}

// Calls f(position of the first element, runs, length) for blocks of the runs [first, last) of a
// channel; the runs of a block are C * S apart.
template <typename F>
void blocks(const View& v, int64_t c, int64_t first, int64_t last, F f) {
  const int64_t runs = std::max<int64_t>(1, kBlock / v.S);
  for (int64_t l = first; l < last; l += runs) {
    for (int64_t s = 0; s < v.S; s += kBlock) {
      f((l * v.C + c) * v.S + s, std::min(runs, last - l), std::min(kBlock, v.S - s));
    }
  }
}

template <typename T>
Moments run_moments(const Layer<T>& layer, int64_t c, int64_t first, int64_t last) {
  const T* x = layer.x;
  const int64_t stride = layer.view.C * layer.view.S;
  const double origin = x[c * layer.view.S];
  Moments moments;
  blocks(layer.view, c, first, last, [&](int64_t at, int64_t runs, int64_t n) {
    auto sum = sums<T, 1>([&](auto v, int64_t i) {
      return std::array{load<decltype(v)>(x + i)};
    });
    for (int64_t r = 0; r < runs; ++r) sum.run(at + r * stride, n);
    const T mean = sum.total()[0] / T(runs * n);
    auto around = sums<T, 2>([&](auto v, int64_t i) {
      const auto d = load<decltype(v)>(x + i) - mean;
      return std::array{d, d * d};
    });
    for (int64_t r = 0; r < runs; ++r) around.run(at + r * stride, n);
    const double count = double(runs * n);
    const auto [rest, squares] = around.total();
    moments.merge(count, mean - origin + rest / count, squares - double(rest) * rest / count);
  });
  return moments;
}

template <typename T>
void run_output(const Layer<T>& layer, Affine<T> affine, T* y, int64_t c, int64_t first,
                int64_t last) {
  const View& view = layer.view;
  const T* x = layer.x;
  for (int64_t l = first; l < last; ++l) {
    const int64_t at = (l * view.C + c) * view.S;
    along<T>(view.S, [&](auto v, int64_t i) {
      const auto z = affine(load<decltype(v)>(x + at + i));
      store(y + at + i, layer.relu ? relu<T>(z) : z);
    });
  }
}

// --- columns -----------------------------------------------------------------------------------

// Rows [first, last) of the columns [begin, end) of a matrix.
struct Tile {
  int64_t first, last, begin, end;

  int64_t width() const { return end - begin; }
};

// Cuts a matrix for `threads`: by columns, and by rows too where that leaves threads idle.
inline std::vector<Tile> tiles(const View& v, int threads) {
  constexpr int64_t kWidth = 512;
  const int64_t width = v.C * v.S;
  const int64_t across = (width + kWidth - 1) / kWidth;
  const int64_t down = std::max<int64_t>(1, std::min<int64_t>(v.L, threads / across));
  std::vector<Tile> result;
  for (int64_t j = 0; j < down; ++j) {
    for (int64_t i = 0; i < across; ++i) {
      result.push_back({v.L * j / down, v.L * (j + 1) / down, i * kWidth,
                        std::min(width, (i + 1) * kWidth)});
    }
  }
  return result;
}

// Calls f(first row, rows) for the blocks of a tile that are summed in T.
template <typename T, typename F>
void row_blocks(const Tile& tile, F f) {
  const int64_t in_cache = 32768 / (tile.width() * int64_t(sizeof(T)));
  const int64_t rows = std::clamp<int64_t>(in_cache, 8, 64);
  for (int64_t l = tile.first; l < tile.last; l += rows) f(l, std::min(rows, tile.last - l));
}

// The moments of each column of a tile, its mean measured from `origin`.
template <typename T>
std::vector<Moments> column_moments(const Layer<T>& layer, const Tile& tile, const T* origin) {
  const int64_t width = tile.width(), stride = layer.view.C * layer.view.S;
  std::vector<T> block_mean(width), block_rest(width), block_squares(width);
  std::vector<double> all_means(width), all_squares(width);
  T *mu = block_mean.data(), *rest = block_rest.data(), *squares = block_squares.data();
  double *mean = all_means.data(), *total = all_squares.data();
  double n = 0;
  row_blocks<T>(tile, [&](int64_t first, int64_t rows) {
    const T* x = layer.x + first * stride + tile.begin;
    std::fill_n(mu, width, T(0));
    std::fill_n(rest, width, T(0));
    std::fill_n(squares, width, T(0));
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t w = 0; w < width; ++w) mu[w] += x[r * stride + w];
    }
#pragma omp simd
    for (int64_t w = 0; w < width; ++w) mu[w] /= T(rows);
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t w = 0; w < width; ++w) {
        const T d = x[r * stride + w] - mu[w];
        rest[w] += d;
        squares[w] += d * d;
      }
    }
    // Moments::merge, with the quotients that all columns share taken out of the loop.
    const double part = rows / (n + rows), weight = n * part, each = 1.0 / rows;
#pragma omp simd
    for (int64_t w = 0; w < width; ++w) {
      const double left = rest[w];
      const double gap = double(mu[w]) - double(origin[w]) + left * each - mean[w];
      total[w] += squares[w] - left * left * each + gap * gap * weight;
      mean[w] += gap * part;
    }
    n += rows;
  });
  std::vector<Moments> result(width);
  for (int64_t w = 0; w < width; ++w) result[w] = {n, mean[w], total[w]};
  return result;
}

// Writes a value per channel beside each column of it.
template <typename T, typename F>
std::vector<T> spread(const View& v, F value) {
  std::vector<T> row(v.C * v.S);
  for (int64_t c = 0; c < v.C; ++c) {
    std::fill_n(row.begin() + c * v.S, v.S, value(c));
  }
  return row;
}

template <typename T>
struct AffineRow {
  std::vector<T> shift, factor, offset;

  AffineRow(const View& v, const std::vector<Affine<T>>& a)
      : shift(spread<T>(v, [&](int64_t c) { return a[c].shift; })),
        factor(spread<T>(v, [&](int64_t c) { return a[c].factor; })),
        offset(spread<T>(v, [&](int64_t c) { return a[c].offset; })) {}
};

// --- forward ---------------------------------------------------------------------------------

inline int threads_for(const View& v) {
  return v.m() * v.C < kWorthThreads || omp_in_parallel() ? 1 : omp_get_max_threads();
}

inline bool by_columns(const View& v) { return v.S < kShortRun; }

// How many parts the L runs of a channel are cut into, so that few channels feed all threads.
inline int64_t parts(const View& v, int threads) {
  const int64_t wanted = v.C >= 4 * threads ? 1 : (4 * threads + v.C - 1) / v.C;
  return threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, v.L));
}

// What to normalize channel c with, from what was kept of its statistics.
template <typename T>
Affine<T> affine_of(const Layer<T>& layer, Normalizer<T> kept, int64_t c) {
  const T factor = layer.gamma ? layer.gamma[c] * kept.inverse_std[c] : kept.inverse_std[c];
  return {kept.shift[c], factor, (layer.beta ? layer.beta[c] : T(0)) - kept.rest[c] * factor};
}

// Keeps the statistics of channel c; its mean is origin + mean.
template <typename T>
Affine<T> keep(const Layer<T>& layer, Normalizer<T> kept, int64_t c, double origin, double mean,
               double variance) {
  const double spread = variance + layer.epsilon;
  kept.shift[c] = T(origin + mean);
  kept.rest[c] = T((origin - kept.shift[c]) + mean);
  kept.inverse_std[c] = spread == 0 ? T(0) : T(1 / std::sqrt(spread));
  return affine_of(layer, kept, c);
}

template <typename T>
void output(const Layer<T>& layer, const std::vector<Affine<T>>& affine, T* y) {
  const View& view = layer.view;
  const int threads = threads_for(view);
  if (by_columns(view)) {
    const AffineRow<T> row(view, affine);
    const int64_t width = view.C * view.S;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t l = 0; l < view.L; ++l) {
      const T *x = layer.x + l * width, *shift = row.shift.data();
      const T *factor = row.factor.data(), *offset = row.offset.data();
      T* to = y + l * width;
      along<T>(width, [&](auto v, int64_t i) {
        using V = decltype(v);
        const V z = (load<V>(x + i) - load<V>(shift + i)) * load<V>(factor + i) +
                    load<V>(offset + i);
        store(to + i, layer.relu ? relu<T>(z) : z);
      });
    }
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t l = 0; l < view.L; ++l) {
    for (int64_t c = 0; c < view.C; ++c) run_output(layer, affine[c], y, c, l, l + 1);
  }
}

// y = gamma (x - mean) / sqrt(variance + epsilon) + beta with the statistics of the batch, which are
// returned in `mean` and `variance` (biased).
template <typename T>
void train(const Layer<T>& layer, Normalizer<T> kept, T* y, T* mean, T* variance) {
  const View& view = layer.view;
  const int threads = threads_for(view);
  std::vector<Affine<T>> affine(view.C);
  auto finish = [&](int64_t c, const Moments& moments) {
    const double origin = layer.x[c * view.S];
    mean[c] = T(origin + moments.mean);
    variance[c] = T(std::max(moments.squares / moments.n, 0.0));
    affine[c] = keep(layer, kept, c, origin, moments.mean, variance[c]);
  };

  if (by_columns(view)) {
    const std::vector<Tile> cut = tiles(view, threads);
    const std::vector<T> origin = spread<T>(view, [&](int64_t c) { return layer.x[c * view.S]; });
    std::vector<std::vector<Moments>> columns(cut.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < cut.size(); ++i) {
      columns[i] = column_moments(layer, cut[i], origin.data() + cut[i].begin);
    }
    std::vector<Moments> channels(view.C);
    for (size_t i = 0; i < cut.size(); ++i) {
      for (int64_t w = cut[i].begin; w < cut[i].end; ++w) {
        const Moments& column = columns[i][w - cut[i].begin];
        channels[w / view.S].merge(column.n, column.mean, column.squares);
      }
    }
    for (int64_t c = 0; c < view.C; ++c) finish(c, channels[c]);
    output(layer, affine, y);
    return;
  }

  const int64_t cuts = parts(view, threads);
  if (cuts == 1) {  // one thread per channel: write while it is in the cache
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < view.C; ++c) {
      finish(c, run_moments(layer, c, 0, view.L));
      run_output(layer, affine[c], y, c, 0, view.L);
    }
    return;
  }
  std::vector<Moments> partial(view.C * cuts);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < view.C * cuts; ++i) {
    const int64_t part = i % cuts;
    partial[i] = run_moments(layer, i / cuts, view.L * part / cuts, view.L * (part + 1) / cuts);
  }
  for (int64_t c = 0; c < view.C; ++c) {
    Moments whole;
    for (int64_t i = 0; i < cuts; ++i) {
      const Moments& part = partial[c * cuts + i];
      whole.merge(part.n, part.mean, part.squares);
    }
    finish(c, whole);
  }
  output(layer, affine, y);
}

// The same with given statistics.
template <typename T>
void infer(const Layer<T>& layer, Normalizer<T> kept, T* y, const T* mean, const T* variance) {
  std::vector<Affine<T>> affine(layer.view.C);
  for (int64_t c = 0; c < layer.view.C; ++c) {
    affine[c] = keep(layer, kept, c, mean[c], 0, variance[c]);
  }
  output(layer, affine, y);
}

// --- gradient ----------------------------------------------------------------------------------

// Sums of dy and of dy (x - shift) over a channel.
struct Pulls {
  double dy = 0, dy_x = 0;
};

// dx = factor dy + slope (x - shift) + level: section 3 of the paper, solved for dx.
template <typename T>
struct Pullback {
  Affine<T> forward;
  T slope, level;

  template <typename V>
  V operator()(V x, V dy) const {
    return forward.factor * dy + (slope * (x - forward.shift) + level);
  }
};

template <typename T>
Pulls run_pulls(const Layer<T>& layer, const Affine<T>& affine, const T* dy, int64_t c,
                int64_t first, int64_t last) {
  const T* x = layer.x;
  const int64_t stride = layer.view.C * layer.view.S;
  Pulls pulls;
  blocks(layer.view, c, first, last, [&](int64_t at, int64_t runs, int64_t n) {
    auto pass = [&](auto sum) {
      for (int64_t r = 0; r < runs; ++r) sum.run(at + r * stride, n);
      const auto total = sum.total();
      pulls.dy += total[0];
      pulls.dy_x += total[1];
    };
    if (layer.relu) {
      pass(sums<T, 2>([&](auto v, int64_t i) {
        using V = decltype(v);
        const V at_x = load<V>(x + i);
        const V g = relu_gradient<T>(affine(at_x), load<V>(dy + i));
        return std::array<V, 2>{g, g * (at_x - affine.shift)};
      }));
    } else {
      pass(sums<T, 2>([&](auto v, int64_t i) {
        using V = decltype(v);
        const V g = load<V>(dy + i);
        return std::array<V, 2>{g, g * (load<V>(x + i) - affine.shift)};
      }));
    }
  });
  return pulls;
}

template <typename T>
void run_gradient(const Layer<T>& layer, const Pullback<T>& pull, const T* dy, T* dx, int64_t c,
                  int64_t first, int64_t last) {
  const View& view = layer.view;
  for (int64_t l = first; l < last; ++l) {
    const int64_t at = (l * view.C + c) * view.S;
    along<T>(view.S, [&](auto v, int64_t i) {
      using V = decltype(v);
      const V x = load<V>(layer.x + at + i);
      const V g = load<V>(dy + at + i);
      store(dx + at + i, pull(x, layer.relu ? relu_gradient<T>(pull.forward(x), g) : g));
    });
  }
}

template <typename T>
std::vector<Pulls> column_pulls(const Layer<T>& layer, const AffineRow<T>& affine, const T* dy,
                                const Tile& tile) {
  const int64_t width = tile.width(), stride = layer.view.C * layer.view.S;
  std::vector<T> sum_dy(width), sum_dy_x(width);
  std::vector<Pulls> result(width);
  const T* shift = affine.shift.data() + tile.begin;
  const T* factor = affine.factor.data() + tile.begin;
  const T* offset = affine.offset.data() + tile.begin;
  T *total = sum_dy.data(), *total_x = sum_dy_x.data();
  row_blocks<T>(tile, [&](int64_t first, int64_t rows) {
    std::fill_n(total, width, T(0));
    std::fill_n(total_x, width, T(0));
    for (int64_t r = first; r < first + rows; ++r) {
      const T *x = layer.x + r * stride + tile.begin, *from = dy + r * stride + tile.begin;
      along<T>(width, [&](auto v, int64_t i) {
        using V = decltype(v);
        const V d = load<V>(x + i) - load<V>(shift + i);
        V g = load<V>(from + i);
        if (layer.relu) g = relu_gradient<T>(d * load<V>(factor + i) + load<V>(offset + i), g);
        store(total + i, load<V>(total + i) + g);
        store(total_x + i, load<V>(total_x + i) + g * d);
      });
    }
    for (int64_t w = 0; w < width; ++w) {
      result[w].dy += total[w];
      result[w].dy_x += total_x[w];
    }
  });
  return result;
}

template <typename T>
void column_gradient(const Layer<T>& layer, const AffineRow<T>& affine,
                     const std::vector<Pullback<T>>& pulls, const T* dy, T* dx, int threads) {
  const View& view = layer.view;
  const int64_t width = view.C * view.S;
  const std::vector<T> slopes = spread<T>(view, [&](int64_t c) { return pulls[c].slope; });
  const std::vector<T> levels = spread<T>(view, [&](int64_t c) { return pulls[c].level; });
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t l = 0; l < view.L; ++l) {
    const T *x = layer.x + l * width, *from = dy + l * width;
    T* to = dx + l * width;
    along<T>(width, [&](auto v, int64_t i) {
      using V = decltype(v);
      const V d = load<V>(x + i) - load<V>(affine.shift.data() + i);
      const V factor = load<V>(affine.factor.data() + i);
      V g = load<V>(from + i);
      if (layer.relu) g = relu_gradient<T>(d * factor + load<V>(affine.offset.data() + i), g);
      store(to + i, factor * g + (load<V>(slopes.data() + i) * d + load<V>(levels.data() + i)));
    });
  }
}

// The gradients; `through_statistics` if the forward was `train`. A null result is not computed.
template <typename T>
void backward(const Layer<T>& layer, Normalizer<T> kept, bool through_statistics, const T* dy,
              T* dx, T* dgamma, T* dbeta) {
  const View& view = layer.view;
  const int threads = threads_for(view);
  const double m = double(view.m());
  std::vector<Affine<T>> affine(view.C);
  std::vector<Pullback<T>> pullback(view.C);
  for (int64_t c = 0; c < view.C; ++c) affine[c] = affine_of(layer, kept, c);

  auto finish = [&](int64_t c, const Pulls& pulls) {
    const double rest = kept.rest[c], inverse_std = kept.inverse_std[c];
    const double dy_xhat = (pulls.dy_x - rest * pulls.dy) * inverse_std;
    if (dgamma) dgamma[c] = T(dy_xhat);
    if (dbeta) dbeta[c] = T(pulls.dy);
    if (!through_statistics) {
      pullback[c] = {affine[c], T(0), T(0)};
      return;
    }
    const double factor = affine[c].factor, slope = -factor * inverse_std * dy_xhat / m;
    pullback[c] = {affine[c], T(slope), T(-slope * rest - factor * pulls.dy / m)};
  };

  if (by_columns(view)) {
    const AffineRow<T> row(view, affine);
    const std::vector<Tile> cut = tiles(view, threads);
    std::vector<std::vector<Pulls>> columns(cut.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < cut.size(); ++i) columns[i] = column_pulls(layer, row, dy, cut[i]);
    std::vector<Pulls> channels(view.C);
    for (size_t i = 0; i < cut.size(); ++i) {
      for (int64_t w = cut[i].begin; w < cut[i].end; ++w) {
        channels[w / view.S].dy += columns[i][w - cut[i].begin].dy;
        channels[w / view.S].dy_x += columns[i][w - cut[i].begin].dy_x;
      }
    }
    for (int64_t c = 0; c < view.C; ++c) finish(c, channels[c]);
    if (dx) column_gradient(layer, row, pullback, dy, dx, threads);
    return;
  }

  const int64_t cuts = parts(view, threads);
  if (cuts == 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < view.C; ++c) {
      finish(c, run_pulls(layer, affine[c], dy, c, 0, view.L));
      if (dx) run_gradient(layer, pullback[c], dy, dx, c, 0, view.L);
    }
    return;
  }
  std::vector<Pulls> partial(view.C * cuts);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < view.C * cuts; ++i) {
    const int64_t c = i / cuts, part = i % cuts;
    partial[i] =
        run_pulls(layer, affine[c], dy, c, view.L * part / cuts, view.L * (part + 1) / cuts);
  }
  for (int64_t c = 0; c < view.C; ++c) {
    Pulls whole;
    for (int64_t i = 0; i < cuts; ++i) {
      whole.dy += partial[c * cuts + i].dy;
      whole.dy_x += partial[c * cuts + i].dy_x;
    }
    finish(c, whole);
  }
  if (!dx) return;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t l = 0; l < view.L; ++l) {
    for (int64_t c = 0; c < view.C; ++c) run_gradient(layer, pullback[c], dy, dx, c, l, l + 1);
  }
}

}  // namespace scratchbn
