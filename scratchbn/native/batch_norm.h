// Batch normalization on a CPU: Algorithm 1 of https://arxiv.org/abs/1502.03167 and its gradient.
//
// Sums are taken over blocks that fit the first-level cache, in T, and added up in double. Where
// mathematics says 0 the result is 0: of a batch whose elements are equal the mean is that element
// to the bit, and so is the mean of gradients that are equal.

#pragma once

#include <cmath>
#include <optional>

#include "walk.h"

namespace scratchbn {

// What follows the normalization.
enum class Relu { kNone, kRelu, kActivation };

// All that one call needs; arrays per channel have C elements.
template <typename T>
struct Layer {
  View view;
  double epsilon;
  Relu relu;
  const T* x;
  const T* gamma;  // null: treated as 1
  const T* beta;   // null: treated as 0
};

// The statistics that the forward saves for the backward. The mean is held in two numbers, high +
// low: `high` as T can hold it, `low` what rounding left, so that x - mean is (x - high) - low
// without loss at any mean.
template <typename T>
struct Saved {
  T *high, *low, *inverse_std;
};

// Coefficients of a channel: y = (x - high) * factor + offset and, in the backward,
// dx = factor (dy - mean) + slope (x - high) + level. Until the mean of dy is known, `mean` is a
// reference that its sum is measured from.
enum Coefficient : size_t { kHigh, kFactor, kOffset, kMean, kSlope, kLevel };

template <typename V, typename K>
inline V normalized(V x, const K& k) {
  return (x - k[kHigh]) * k[kFactor] + k[kOffset];
}

// Mean and sum of squared deviations of n values; merging two is exact in real numbers
// (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm", 1979). The mean is
// measured from an element of the channel, so that it is small and merging is exact in double.
struct Moments {
  double n = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    const double total = n + other.n;
    if (total == 0) return;
    const double gap = other.mean - mean;
    squares += other.squares + gap * gap * (n * other.n / total);
    mean += gap * (other.n / total);
    n = total;
  }
};

template <typename T>
Moments run_moments(const Layer<T>& layer, int64_t c, int64_t first, int64_t last) {
  const T* x = layer.x;
  const int64_t stride = layer.view.stride();
  const double origin = x[layer.view.at(0, c)];
  Moments moments;
  blocks(layer.view, c, first, last, [&](int64_t at, int64_t runs, int64_t n) {
    auto sum = sums<T, 1>([&](auto v, int64_t i) { return std::array{load<decltype(v)>(x + i)}; });
    for (int64_t r = 0; r < runs; ++r) sum.run(at + r * stride, n);
    const T mean = sum.total()[0] / T(runs * n);
    auto around = sums<T, 2>([&](auto v, int64_t i) {
      const auto d = load<decltype(v)>(x + i) - mean;
      return std::array{d, d * d};
    });
    for (int64_t r = 0; r < runs; ++r) around.run(at + r * stride, n);
    const double count = double(runs * n);
    const auto [left, squares] = around.total();
    moments.merge({count, mean - origin + left / count, squares - double(left) * left / count});
  });
  return moments;
}

// The moments of each column of a tile.
template <typename T>
Array<Moments> column_moments(const Layer<T>& layer, const Tile& tile) {
  const int64_t width = tile.width(), stride = layer.view.stride(), S = layer.view.S;
  Array<T> origins(width), means(width), rests(width), block_squares(width);
  Array<double> all_means(width), all_squares(width);
  T *origin = origins.data(), *mu = means.data();
  T *rest = rests.data(), *squares = block_squares.data();
  double *mean = all_means.data(), *total = all_squares.data();
  double n = 0;
  for (int64_t w = 0; w < width; ++w) origin[w] = layer.x[(tile.begin + w) / S * S];
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
    const double count = double(rows), part = count / (n + count), weight = n * part;
#pragma omp simd
    for (int64_t w = 0; w < width; ++w) {
      const double left = rest[w], each = left / count;
      const double gap = double(mu[w]) - double(origin[w]) + each - mean[w];
      total[w] += squares[w] - left * each + gap * gap * weight;
      mean[w] += gap * part;
    }
    n += count;
  });
  Array<Moments> result(width);
  for (int64_t w = 0; w < width; ++w) result[w] = {n, mean[w], total[w]};
  return result;
}

// --- forward ---------------------------------------------------------------------------------

// Saves the statistics of channel c; its mean is origin + mean.
template <typename T>
void save(const Layer<T>& layer, Saved<T> saved, int64_t c, double origin, double mean,
          double variance) {
  const double padded = variance + layer.epsilon;
  saved.high[c] = T(origin + mean);
  saved.low[c] = T((origin - saved.high[c]) + mean);
  saved.inverse_std[c] = padded == 0 ? T(0) : T(1 / std::sqrt(padded));
}

// Sets what channel c is normalized with, from its statistics.
template <typename T, size_t K>
void set_normalized(const Layer<T>& layer, Saved<T> saved, int64_t c, Coefficients<T, K>& k) {
  const T factor = layer.gamma ? layer.gamma[c] * saved.inverse_std[c] : saved.inverse_std[c];
  k[kHigh][c] = saved.high[c];
  k[kFactor][c] = factor;
  k[kOffset][c] = (layer.beta ? layer.beta[c] : T(0)) - saved.low[c] * factor;
}

template <typename T>
auto output(const Layer<T>& layer, const Coefficients<T, 3>& coefficients, T* y) {
  return Map(layer.view, coefficients, y, [layer](auto v, int64_t i, const auto& k) {
    const auto z = normalized(load<decltype(v)>(layer.x + i), k);
    return layer.relu == Relu::kNone ? z
           : layer.relu == Relu::kRelu ? relu<T>(z)
                                       : activation<T>(z);
  });
}

// y = gamma (x - mean) / sqrt(variance + epsilon) + beta with the statistics of the batch, which
// are returned in `mean` and `variance` (biased).
template <typename T>
void train(const Layer<T>& layer, Saved<T> saved, T* y, T* mean, T* variance) {
  Coefficients<T, 3> coefficients(layer.view.C);
  reduce_channels(
      layer.view,
      [&](int64_t c, int64_t first, int64_t last) { return run_moments(layer, c, first, last); },
      [&](const Tile& tile) { return column_moments(layer, tile); },
      [&](int64_t c, const Moments& moments) {
        const double origin = layer.x[layer.view.at(0, c)];
        mean[c] = T(origin + moments.mean);
        variance[c] = T(std::max(moments.squares / moments.n, 0.0));
        save(layer, saved, c, origin, moments.mean, variance[c]);
        set_normalized(layer, saved, c, coefficients);
      },
      output(layer, coefficients, y));
}

// The same with given statistics.
template <typename T>
void infer(const Layer<T>& layer, Saved<T> saved, T* y, const T* mean, const T* variance) {
  Coefficients<T, 3> coefficients(layer.view.C);
  for (int64_t c = 0; c < layer.view.C; ++c) {
    save(layer, saved, c, mean[c], 0, variance[c]);
    set_normalized(layer, saved, c, coefficients);
  }
  output(layer, coefficients, y).everything();
}

// --- gradient ----------------------------------------------------------------------------------

// Over a channel or a part of it: the sum of dy, less a reference each, and of dy (x - high).
struct GradientSums {
  double dy = 0, dy_x = 0;

  void merge(const GradientSums& other) {
    dy += other.dy;
    dy_x += other.dy_x;
  }
};

// The gradient dy at position i as the normalization receives it: of a ReLU, if there is one.
template <typename V, typename T, typename K>
inline V gradient_at(const Layer<T>& layer, const T* dy, int64_t i, const K& k) {
  const V g = load<V>(dy + i);
  if (layer.relu == Relu::kNone) return g;
  const V z = normalized(load<V>(layer.x + i), k);
  return layer.relu == Relu::kRelu ? relu_gradient<T>(z, g) : activation_gradient<T>(z, g);
}

template <typename T>
GradientSums run_gradient_sums(const Layer<T>& layer, const std::array<T, 6>& k, const T* dy,
                               int64_t c, int64_t first, int64_t last) {
  const int64_t stride = layer.view.stride();
  GradientSums result;
  blocks(layer.view, c, first, last, [&](int64_t at, int64_t runs, int64_t n) {
    auto sum = sums<T, 2>([layer, k, dy](auto v, int64_t i) {
      using V = decltype(v);
      const V g = gradient_at<V>(layer, dy, i, k);
      return std::array<V, 2>{g - k[kMean], g * (load<V>(layer.x + i) - k[kHigh])};
    });
    for (int64_t r = 0; r < runs; ++r) sum.run(at + r * stride, n);
    const auto [total, total_x] = sum.total();
    result.merge({total, total_x});
  });
  return result;
}

template <typename T>
Array<GradientSums> column_gradient_sums(const Layer<T>& layer, const Row<T, 4>& row,
                                               const T* dy, const Tile& tile) {
  const int64_t width = tile.width(), stride = layer.view.stride();
  Array<T> sum_dy(width), sum_dy_x(width);
  T *total = sum_dy.data(), *total_x = sum_dy_x.data();
  const auto columns = row.columns();
  Array<GradientSums> result(width);
  row_blocks<T>(tile, [&](int64_t first, int64_t rows) {
    std::fill_n(total, width, T(0));
    std::fill_n(total_x, width, T(0));
    for (int64_t r = first; r < first + rows; ++r) {
      const int64_t at = r * stride + tile.begin;
      along<T>(width, [=](auto v, int64_t i) {
        using V = decltype(v);
        const auto k = columns(v, tile.begin + i);
        const V g = gradient_at<V>(layer, dy, at + i, k);
        store(total + i, load<V>(total + i) + (g - k[kMean]));
        store(total_x + i, load<V>(total_x + i) + g * (load<V>(layer.x + at + i) - k[kHigh]));
      });
    }
    for (int64_t w = 0; w < width; ++w) result[w].merge({total[w], total_x[w]});
  });
  return result;
}

// What the sum of dy is measured from in channel c. If its first and last gradient are equal it is
// them, so that a channel of equal gradients has their mean to the bit; it is 0 otherwise, as an
// outlier would cost digits.
template <typename T>
T reference_of(const Layer<T>& layer, const std::array<T, 6>& k, const T* dy, int64_t c) {
  const View& v = layer.view;
  const T first = gradient_at<T>(layer, dy, v.at(0, c), k);
  const T last = gradient_at<T>(layer, dy, v.at(v.L - 1, c) + v.S - 1, k);
  return first - last == T(0) ? first : T(0);  // not if they are infinite
}

// The gradients; `through_statistics` if the forward was `train`. A null result is not computed.
// Section 3 of the paper, solved for dx:
// dx = factor (dy - mean of dy) + slope (x - mean), slope = -factor inverse_std mean of dy xhat.
template <typename T>
void backward(const Layer<T>& layer, Saved<T> saved, bool through_statistics, const T* dy, T* dx,
              T* dgamma, T* dbeta) {
  const View& view = layer.view;
  const double m = double(view.m());
  Coefficients<T, 6> k(view.C);
  for (int64_t c = 0; c < view.C; ++c) {
    set_normalized(layer, saved, c, k);
    k[kMean][c] = reference_of(layer, k.of(c), dy, c);
  }
  std::optional<Row<T, 4>> row;
  if (view.by_columns()) row.emplace(view, k);

  reduce_channels(
      view,
      [&](int64_t c, int64_t first, int64_t last) {
        return run_gradient_sums(layer, k.of(c), dy, c, first, last);
      },
      [&](const Tile& tile) { return column_gradient_sums(layer, *row, dy, tile); },
      [&](int64_t c, const GradientSums& sums) {
        const double low = saved.low[c], inverse_std = saved.inverse_std[c];
        const double reference = k[kMean][c], factor = k[kFactor][c];
        const double sum = sums.dy + m * reference, mean = reference + sums.dy / m;
        const double dy_xhat = (sums.dy_x - low * sum) * inverse_std;
        if (dgamma) dgamma[c] = T(dy_xhat);
        if (dbeta) dbeta[c] = T(sum);
        const double slope = -factor * inverse_std * dy_xhat / m;
        const double level = -slope * low - factor * (mean - T(mean));
        k[kMean][c] = through_statistics ? T(mean) : T(0);
        k[kSlope][c] = through_statistics ? T(slope) : T(0);
        k[kLevel][c] = through_statistics ? T(level) : T(0);
      },
      Map(view, k, dx, [layer, dy](auto v, int64_t i, const auto& k) {
        using V = decltype(v);
        const V d = load<V>(layer.x + i) - k[kHigh];
        return k[kFactor] * (gradient_at<V>(layer, dy, i, k) - k[kMean]) +
               (k[kSlope] * d + k[kLevel]);
      }));
}

}  // namespace scratchbn
