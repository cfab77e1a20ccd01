// Batch normalization on a GPU: Algorithm 1 of https://arxiv.org/abs/1502.03167 and its gradient.
//
// forward:  moments (reads x), transform (reads x, writes y)
// backward: gradient_sums (reads x, dy), gradient (reads x, dy, writes dx)
// Sums are added in an order that the shape fixes, without atomics and shuffles, so that a result
// is the same from run to run, and a C++ compiler can compile this file for a CPU. Blocks count
// together only how many of them are done, see sums.h. The flag is read here, so that the host
// never waits.
//
// Sums are taken in W, see call.h, over a few dozen elements, then in double. As in batch_norm.h:
// where mathematics says 0 the result is 0.

#include "sums.h"

// --- forward -----------------------------------------------------------------------------------

// Per channel: the sum of x and of x^2, both measured from the channel's first element. A thread
// measures from the first element it sees, which costs no digits.
template <typename T, int V>
static __device__ void add_moments(const Call& k) {
  typedef typename Types<T>::Wide W;
  const T* x = static_cast<const T*>(k.x);
  const Pack<T, V>* from[1] = {packs<T, V>(x)};
  Walk w(k);
  W pivot[V] = {}, sum[V] = {}, square[V] = {};
  double sums[V] = {}, squares[V] = {};
  const double n = double(w.left);
  if (w.left > 0) {
    const Pack<T, V> first = from[0][w.at];
#pragma unroll
    for (int j = 0; j < V; ++j) pivot[j] = Types<T>::wide(first.v[j]);
  }
  along(
      w, from,
      [&](i64, const Pack<T, V>(&v)[1]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const W d = Types<T>::wide(v[0].v[j]) - pivot[j];
          sum[j] += d, square[j] += d * d;
        }
      },
      [&] {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums[j] += double(sum[j]), squares[j] += double(square[j]);
          sum[j] = square[j] = 0;
        }
      });
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (n > 0) {
      const double origin = double(Types<T>::wide(x[i64(channel<V>(k, j)) * k.S]));
      const double shift = double(pivot[j]) - origin;
      squares[j] += shift * (2 * sums[j] + shift * n);
      sums[j] += shift * n;
    }
  }
  leave(k, sums, squares);
}

// Saves the statistics of a channel, whose sums are `sum` in training. The mean is held in two
// numbers, high + low: what W can hold of it, and what rounding left.
template <typename T>
static __device__ void keep_statistics(const Call& k, bool trained, int c, Pair sum) {
  typedef typename Types<T>::Wide W;
  const double m = double(k.L) * double(k.S);
  double origin, mean = 0, variance;
  if (trained) {
    origin = double(Types<T>::wide(static_cast<const T*>(k.x)[i64(c) * k.S]));
    mean = sum.a / m;
    const double spread = (sum.b - sum.a * mean) / m;
    variance = spread <= 0 ? 0 : double(W(spread));  // NaN stays NaN
    static_cast<W*>(k.lines)[c] = W(origin + mean);
    static_cast<W*>(k.lines)[k.C + c] = W(variance * (k.unbiased ? m / (m - 1) : 1));
  } else {
    origin = double(static_cast<const W*>(k.running_mean)[c]);
    variance = double(static_cast<const W*>(k.running_var)[c]);
  }
  W* kept = static_cast<W*>(k.kept);
  const W high = W(origin + mean);
  const double padded = variance + k.epsilon;
  kept[c] = high;
  kept[k.C + c] = W((origin - double(high)) + mean);
  kept[2 * k.C + c] = padded == 0 ? W(0) : W(1 / sqrt(padded));
  static_cast<W*>(k.token)[c] = 1;
}

template <typename T, int V>
static __device__ void moments(const Call& k) {
  if (*k.flag == 1 || k.L == 0 || k.S == 0) {  // there is nothing to add up
    const Team team(k);
    const int c = team.first + threadIdx.x;
    const bool mine = blockIdx.y == 0 && blockIdx.x % k.team == 0 && threadIdx.x < team.channels;
    if (mine) keep_statistics<T>(k, false, c, {0, 0});
    return;
  }
  add_moments<T, V>(k);
  Gathered sums;
  if (gather(k, sums) && sums.valid) keep_statistics<T>(k, true, sums.c, sums.sum);
}

// Section 3.1 of the paper: the moving averages. A batch whose statistics are not all finite leaves
// them as they are. One block.
template <typename W>
static __device__ void move_averages(const Call& k) {
  __shared__ int bad;
  const int t = threadIdx.x;
  const W *mean = static_cast<const W*>(k.lines), *variance = mean + k.C;
  W *running_mean = static_cast<W*>(k.running_mean), *running_var = static_cast<W*>(k.running_var);
  W* count = static_cast<W*>(k.num_batches);
  if (t == 0) bad = 0;
  __syncthreads();
  for (int c = t; c < k.C; c += kThreads) {
    if (!(mean[c] - mean[c] == 0 && variance[c] - variance[c] == 0)) bad = 1;
  }
  const double keep = k.cumulative ? 1 - 1 / (double(*count) + 1) : k.momentum;
  __syncthreads();
  if (bad) return;
  for (int c = t; c < k.C; c += kThreads) {
    running_mean[c] = W(keep * double(running_mean[c]) + (1 - keep) * double(mean[c]));
    running_var[c] = W(keep * double(running_var[c]) + (1 - keep) * double(variance[c]));
  }
  if (k.cumulative && t == 0) *count += 1;
}

// What a channel is normalized with: y = (x - high) * factor + offset.
template <typename W>
struct Affine {
  W high, factor, offset;

  __device__ void set(const Call& k, int c) {
    const W* kept = static_cast<const W*>(k.kept);
    const W *gamma = static_cast<const W*>(k.gamma), *beta = static_cast<const W*>(k.beta);
    high = kept[c];
    factor = gamma ? gamma[c] * kept[2 * k.C + c] : kept[2 * k.C + c];
    offset = (beta ? beta[c] : W(0)) - kept[k.C + c] * factor;
  }
  __device__ W operator()(W x) const { return (x - high) * factor + offset; }
};

template <typename T, int V>
static __device__ void transform(const Call& k) {
  typedef typename Types<T>::Wide W;
  if (blockIdx.x == 0 && blockIdx.y == 0 && *k.flag != 1) move_averages<W>(k);
  Affine<W> affine[V];
#pragma unroll
  for (int j = 0; j < V; ++j) affine[j].set(k, channel<V>(k, j));
  Pack<T, V>* y = static_cast<Pack<T, V>*>(k.y);
  const Pack<T, V>* from[1] = {packs<T, V>(k.x)};
  const bool relu = k.relu;
  Walk w(k);
  along(
      w, from,
      [&](i64 at, const Pack<T, V>(&v)[1]) {
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const W z = affine[j](Types<T>::wide(v[0].v[j]));
          out.v[j] = Types<T>::narrow(relu && z <= 0 ? W(0) : z);
        }
        y[at] = out;
      },
      [] {});
}

// --- gradient ----------------------------------------------------------------------------------

// The gradient as the normalization receives it: of a ReLU, if there is one.
template <typename W>
static __device__ W passed(bool relu, const Affine<W>& affine, W x, W dy) {
  if (!relu) return dy;
  const W z = affine(x);
  return z > 0 ? dy : (z == z ? W(0) : z);
}

// What the sum of dy is measured from: the channel's first gradient, if its last is equal, so that
// a channel of equal gradients has their mean to the bit; else 0, as an outlier would cost digits.
template <typename T, typename W>
static __device__ W reference(const Call& k, const Affine<W>& affine, int c) {
  const T *x = static_cast<const T*>(k.x), *dy = static_cast<const T*>(k.dy);
  W ends[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const i64 at = i ? (i64(k.L - 1) * k.C + c + 1) * k.S - 1 : i64(c) * k.S;
    ends[i] = passed(k.relu, affine, Types<T>::wide(x[at]), Types<T>::wide(dy[at]));
  }
  return ends[0] - ends[1] == 0 ? ends[0] : W(0);  // not if they are infinite
}

// Per channel: the sum of dy, less the reference each, and of dy (x - high).
template <typename T, int V>
static __device__ void add_gradients(const Call& k) {
  typedef typename Types<T>::Wide W;
  const Pack<T, V>* from[2] = {packs<T, V>(k.x), packs<T, V>(k.dy)};
  const bool relu = k.relu;
  Affine<W> affine[V];
  W level[V], sum[V] = {}, sum_x[V] = {};
  double sums[V] = {}, sums_x[V] = {};
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int c = channel<V>(k, j);
    affine[j].set(k, c);
    level[j] = reference<T>(k, affine[j], c);
  }
  Walk w(k);
  along(
      w, from,
      [&](i64, const Pack<T, V>(&v)[2]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const W x = Types<T>::wide(v[0].v[j]);
          const W g = passed(relu, affine[j], x, Types<T>::wide(v[1].v[j]));
          sum[j] += g - level[j], sum_x[j] += g * (x - affine[j].high);
        }
      },
      [&] {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums[j] += double(sum[j]), sums_x[j] += double(sum_x[j]);
          sum[j] = sum_x[j] = 0;
        }
      });
  leave(k, sums, sums_x);
}

// Section 3 of the paper, solved for dx:
// dx = factor (dy - mean of dy) + slope (x - mean), slope = -factor / std * mean of dy xhat.
template <typename T>
static __device__ void keep_gradients(const Call& k, int c, Pair sums) {
  typedef typename Types<T>::Wide W;
  W *dgamma = static_cast<W*>(k.dgamma), *dbeta = static_cast<W*>(k.dbeta);
  const double m = double(k.L) * double(k.S);
  if (m == 0) {
    if (dgamma) dgamma[c] = 0;
    if (dbeta) dbeta[c] = 0;
    return;
  }
  Affine<W> affine;
  affine.set(k, c);
  const W* kept = static_cast<const W*>(k.kept);
  const double low = double(kept[k.C + c]), inverse_std = double(kept[2 * k.C + c]);
  const double level = double(reference<T>(k, affine, c)), factor = double(affine.factor);
  const double sum = sums.a + m * level, mean = level + sums.a * k.share;
  const double dy_xhat = (sums.b - low * sum) * inverse_std;
  if (dgamma) dgamma[c] = k.gamma ? W(dy_xhat) : W(0);
  if (dbeta) dbeta[c] = k.beta ? W(sum) : W(0);
  const bool trained = *k.flag != 1;
  const double slope = -factor * inverse_std * dy_xhat * k.share;
  W* lines = static_cast<W*>(k.lines);
  lines[c] = trained ? W(mean) : W(0);
  lines[k.C + c] = trained ? W(slope) : W(0);
  lines[2 * k.C + c] = trained ? W(-slope * low - factor * (mean - double(W(mean)))) : W(0);
}

template <typename T, int V>
static __device__ void gradient_sums(const Call& k) {
  Gathered sums;
  if (k.L == 0 || k.S == 0) {
    if (threadIdx.x == 0) keep_gradients<T>(k, blockIdx.x, {0, 0});
    return;
  }
  add_gradients<T, V>(k);
  if (gather(k, sums) && sums.valid) keep_gradients<T>(k, sums.c, sums.sum);
}

template <typename T, int V>
static __device__ void gradient(const Call& k) {
  typedef typename Types<T>::Wide W;
  const W* lines = static_cast<const W*>(k.lines);
  Affine<W> affine[V];
  W mean[V], slope[V], level[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int c = channel<V>(k, j);
    affine[j].set(k, c);
    mean[j] = lines[c], slope[j] = lines[k.C + c], level[j] = lines[2 * k.C + c];
  }
  Pack<T, V>* dx = static_cast<Pack<T, V>*>(k.dx);
  const Pack<T, V>* from[2] = {packs<T, V>(k.x), packs<T, V>(k.dy)};
  const bool relu = k.relu;
  Walk w(k);
  along(
      w, from,
      [&](i64 at, const Pack<T, V>(&v)[2]) {
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const W x = Types<T>::wide(v[0].v[j]);
          const W g = passed(relu, affine[j], x, Types<T>::wide(v[1].v[j]));
          out.v[j] = Types<T>::narrow(affine[j].factor * (g - mean[j]) +
                                      (slope[j] * (x - affine[j].high) + level[j]));
        }
        dx[at] = out;
      },
      [] {});
}

// --- kernels -----------------------------------------------------------------------------------

#define KERNEL(name, function)                                                \
  extern "C" __global__ void __launch_bounds__(kThreads) name(const Call k) { \
    function(k);                                                              \
  }
#define STREAMING(T, name, V)                                  \
  KERNEL(moments_##name##_##V, (moments<T, V>))                \
  KERNEL(transform_##name##_##V, (transform<T, V>))            \
  KERNEL(gradient_sums_##name##_##V, (gradient_sums<T, V>))    \
  KERNEL(gradient_##name##_##V, (gradient<T, V>))
#define KERNELS(T, name, V) STREAMING(T, name, 1) STREAMING(T, name, V)

KERNELS(Half, half, 4)
KERNELS(float, float, 4)
KERNELS(double, double, 2)
