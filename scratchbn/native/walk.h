// How an array of shape (L, C, S) is walked, channel by channel.
//
// By rows, if S is long: the elements of a channel are L runs of S neighbours, and one thread takes
// a channel whole, so that what it has just summed is still in its cache when it writes. By
// columns, if S is short (dense layers and channels-last: S = 1): the array is a matrix of L rows
// and C * S columns, every loop runs along a row, and the S columns of a channel are put together
// at the end.

#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace scratchbn {

// A vector that is counted and indexed by int64_t, as all else here.
template <typename T>
class Array {
 public:
  explicit Array(int64_t n) : values_(size_t(n)) {}

  T& operator[](int64_t i) { return values_.data()[i]; }
  const T& operator[](int64_t i) const { return values_.data()[i]; }
  T* data() { return values_.data(); }
  const T* data() const { return values_.data(); }
  auto begin() const { return values_.begin(); }
  auto end() const { return values_.end(); }

 private:
  std::vector<T> values_;
};

// An array seen as L positions before the channel axis, C channels, S positions after it.
struct View {
  int64_t L, C, S;

  int64_t m() const { return L * S; }  // elements of one channel
  bool empty() const { return m() * C == 0; }
  int64_t stride() const { return C * S; }  // from a run of a channel to the next
  int64_t at(int64_t l, int64_t c) const { return (l * C + c) * S; }
  bool by_columns() const;
};

constexpr int64_t kShortRun = 16;         // S below this: by columns
constexpr int64_t kBlock = 2048;          // elements summed in T before they are added in double
constexpr int64_t kTileWidth = 512;       // columns
constexpr int64_t kWorthThreads = 16384;  // elements below which a second thread costs more

inline bool View::by_columns() const { return S < kShortRun; }

inline int threads_for(const View& v) {
  return v.m() * v.C < kWorthThreads || omp_in_parallel() ? 1 : omp_get_max_threads();
}

// How many parts the L runs of a channel are cut into, so that few channels feed all threads.
inline int64_t parts(const View& v, int threads) {
  const int64_t wanted = v.C >= 4 * threads ? 1 : (4 * threads + v.C - 1) / v.C;
  return threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, v.L));
}

// Calls f(position of the first element, runs, length) for blocks of the runs [first, last) of a
// channel; the runs of a block are a stride apart.
template <typename F>
void blocks(const View& v, int64_t c, int64_t first, int64_t last, F f) {
  const int64_t runs = std::max<int64_t>(1, kBlock / v.S);
  for (int64_t l = first; l < last; l += runs) {
    for (int64_t s = 0; s < v.S; s += kBlock) {
      f(v.at(l, c) + s, std::min(runs, last - l), std::min(kBlock, v.S - s));
    }
  }
}

// Rows [first, last) of the columns [begin, end) of a matrix.
struct Tile {
  int64_t first, last, begin, end;

  int64_t width() const { return end - begin; }
};

// Cuts a matrix for `threads`: by columns, and by rows too where that leaves threads idle.
inline std::vector<Tile> tiles(const View& v, int threads) {
  const int64_t width = v.stride(), across = (width + kTileWidth - 1) / kTileWidth;
  const int64_t down = std::max<int64_t>(1, std::min<int64_t>(v.L, threads / across));
  std::vector<Tile> result;
  for (int64_t j = 0; j < down; ++j) {
    for (int64_t i = 0; i < across; ++i) {
      result.push_back({v.L * j / down, v.L * (j + 1) / down, i * kTileWidth,
                        std::min(width, (i + 1) * kTileWidth)});
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

// K numbers for each channel, all that an element of it is computed with.
template <typename T, size_t K>
class Coefficients {
 public:
  explicit Coefficients(int64_t channels) : C_(channels), values_(int64_t(K) * channels) {}

  T* operator[](size_t k) { return values_.data() + int64_t(k) * C_; }
  const T* operator[](size_t k) const { return values_.data() + int64_t(k) * C_; }

  std::array<T, K> of(int64_t c) const {
    std::array<T, K> result;
    for (size_t k = 0; k < K; ++k) result[k] = (*this)[k][c];
    return result;
  }

 private:
  int64_t C_;
  Array<T> values_;
};

// The first K coefficients, repeated over the S columns of their channels. They must outlive it.
template <typename T, size_t K>
class Row {
 public:
  template <size_t N>
  Row(const View& v, const Coefficients<T, N>& coefficients)
      : values_(v.S == 1 ? 0 : int64_t(K) * v.stride()) {
    T* to = values_.data();
    for (size_t k = 0; k < K; ++k) {
      starts_[k] = v.S == 1 ? coefficients[k] : to;
      if (v.S == 1) continue;
      for (int64_t c = 0; c < v.C; ++c) to = std::fill_n(to, v.S, coefficients[k][c]);
    }
  }

  // A function from V{} and a column to the coefficients there.
  auto columns() const {
    return [starts = starts_](auto v, int64_t column) {
      std::array<decltype(v), K> result;
      for (size_t k = 0; k < K; ++k) result[k] = load<decltype(v)>(starts[k] + column);
      return result;
    };
  }

 private:
  Array<T> values_;
  std::array<const T*, K> starts_;
};

// to[i] = f(V{}, i, the coefficients of its channel), for every element; a null `to` is not
// written.
template <typename T, size_t K, typename F>
class Map {
 public:
  Map(const View& view, const Coefficients<T, K>& coefficients, T* to, F f)
      : view_(view), coefficients_(coefficients), to_(to), f_(f) {}

  void channel(int64_t c) const {
    if (to_) runs(c, 0, view_.L);
  }

  void everything() const {
    if (!to_ || view_.empty()) return;
    const int threads = threads_for(view_);
    if (view_.by_columns()) {
      const Row<T, K> row(view_, coefficients_);
      const int64_t width = view_.stride();
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t l = 0; l < view_.L; ++l) {
        const int64_t at = l * width;
        along<T>(width, [at, to = to_, f = f_, columns = row.columns()](auto v, int64_t i) {
          store(to + at + i, f(v, at + i, columns(v, i)));
        });
      }
      return;
    }
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t l = 0; l < view_.L; ++l) {
      for (int64_t c = 0; c < view_.C; ++c) runs(c, l, l + 1);
    }
  }

 private:
  void runs(int64_t c, int64_t first, int64_t last) const {
    for (int64_t l = first; l < last; ++l) {
      const int64_t at = view_.at(l, c);
      along<T>(view_.S, [at, to = to_, f = f_, k = coefficients_.of(c)](auto v, int64_t i) {
        store(to + at + i, f(v, at + i, k));
      });
    }
  }

  const View view_;
  const Coefficients<T, K>& coefficients_;
  T* const to_;
  const F f_;
};

// Reduces every channel, then writes what follows from it. `per_run(c, first, last)` returns what
// the runs [first, last) of channel c are reduced to, `per_tile(tile)` a vector of what the columns
// of a tile are, `merge` of that type puts two together; `finish(c, whole)` takes the result and
// sets the coefficients that `map` writes with.
template <typename PerRun, typename PerTile, typename Finish, typename Write>
void reduce_channels(const View& v, PerRun per_run, PerTile per_tile, Finish finish,
                     const Write& map) {
  using Part = decltype(per_run(0, 0, 0));
  const int threads = threads_for(v);
  const int64_t cuts = parts(v, threads);
  if (!v.by_columns() && cuts == 1) {  // a thread writes a channel while it is in its cache
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < v.C; ++c) {
      finish(c, per_run(c, 0, v.L));
      map.channel(c);
    }
    return;
  }
  Array<Part> whole(v.C);
  if (v.by_columns()) {
    const std::vector<Tile> cut = tiles(v, threads);
    std::vector<Array<Part>> columns(cut.size(), Array<Part>(0));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < cut.size(); ++i) columns[i] = per_tile(cut[i]);
    for (size_t i = 0; i < cut.size(); ++i) {
      int64_t column = cut[i].begin;
      for (const Part& part : columns[i]) whole[column++ / v.S].merge(part);
    }
  } else {
    Array<Part> partial(v.C * cuts);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < v.C * cuts; ++i) {
      const int64_t part = i % cuts;
      partial[i] = per_run(i / cuts, v.L * part / cuts, v.L * (part + 1) / cuts);
    }
    for (int64_t i = 0; i < v.C * cuts; ++i) whole[i / cuts].merge(partial[i]);
  }
  for (int64_t c = 0; c < v.C; ++c) finish(c, whole[c]);
  map.everything();
}

}  // namespace scratchbn
