// Runs of neighbouring numbers, taken a vector at a time by the extensions GCC and Clang share.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace scratchbn {

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

template <typename T>
constexpr int64_t kWidth = kVectorBytes / int64_t(sizeof(T));

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

template <typename T, typename V>
inline V relu(V z) {
  return z <= T(0) ? V{} : z;  // NaN stays NaN
}

template <typename T, typename V>
inline V relu_gradient(V z, V dy) {
  return z > T(0) ? dy : (z == z ? V{} : z);
}

// The same as MXNet's Activation has them, which hides NaN where oneDNN computes it.
template <typename T, typename V>
inline V activation(V z) {
  return z > T(0) ? z : V{};
}

template <typename T, typename V>
inline V activation_gradient(V z, V dy) {
  return z > T(0) ? dy : V{};
}

// Calls f(V{}, i) for i = 0, w, 2w, ... with vectors V of width w, and with single numbers at the
// end.
template <typename T, typename F>
inline void along(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) f(Vector<T>{}, i);
  for (; i < n; ++i) f(T{}, i);
}

// Adds up K terms, each a function of the position, along runs. Four vectors take turns, so that
// one addition need not wait for the one before.
template <typename T, size_t K, typename F>
class Sums {
 public:
  explicit Sums(F terms) : terms_(terms) {}

  void run(int64_t begin, int64_t n) {
    constexpr int64_t w = kWidth<T>;
    const int64_t end = begin + n;
    int64_t i = begin;
    for (; i + 4 * w <= end; i += 4 * w) {
      for (int j = 0; j < 4; ++j) add(vectors_[j], terms_(Vector<T>{}, i + j * w));
    }
    for (; i + w <= end; i += w) add(vectors_[0], terms_(Vector<T>{}, i));
    for (; i < end; ++i) add(single_, terms_(T{}, i));
  }

  std::array<T, K> total() const {
    std::array<T, K> sum = single_;
    for (size_t k = 0; k < K; ++k) {
      const Vector<T> v = (vectors_[0][k] + vectors_[1][k]) + (vectors_[2][k] + vectors_[3][k]);
      for (int i = 0; i < kWidth<T>; ++i) sum[k] += v[i];
    }
    return sum;
  }

 private:
  template <typename V>
  static void add(std::array<V, K>& to, const std::array<V, K>& terms) {
    for (size_t k = 0; k < K; ++k) to[k] += terms[k];
  }

  F terms_;
  std::array<Vector<T>, K> vectors_[4] = {};
  std::array<T, K> single_ = {};
};

template <typename T, size_t K, typename F>
Sums<T, K, F> sums(F terms) {
  return Sums<T, K, F>(terms);
}

}  // namespace scratchbn
