// How the threads of a GPU walk an array of shape (L, C, S), see call.h, and read it.

#pragma once

#include "call.h"

using scratchbn_gpu::Call;
using scratchbn_gpu::kThreads;
typedef long long i64;

constexpr int kUnroll = 4;  // vectors that a thread has under way at once
constexpr int kRounds = 4;  // of kUnroll, before sums go from W to double

struct Half {
  unsigned short bits;
};

#ifdef __CUDACC_RTC__
static __device__ float half_to_float(unsigned short h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
static __device__ unsigned short float_to_half(float f) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
#endif

template <typename T>
struct Types {
  typedef T Wide;
  static __device__ T wide(T v) { return v; }
  static __device__ T narrow(T v) { return v; }
};
template <>
struct Types<Half> {
  typedef float Wide;
  static __device__ float wide(Half v) { return half_to_float(v.bits); }
  static __device__ Half narrow(float v) { return Half{float_to_half(v)}; }
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {  // one load
  T v[V];
};

// The vectors of one thread.
struct Walk {
  i64 at, left, jump, wrap;  // wrap: to the next run of the channel
  int run, s, ds;            // vectors of a run, position in it, its step

  __device__ explicit Walk(const Call& k) {
    const int t = threadIdx.x;
    const i64 all = k.columns ? k.L : i64(k.L) * k.vectors;
    const i64 begin = blockIdx.y * k.each, end = begin + k.each < all ? begin + k.each : all;
    i64 first, step;
    if (k.columns) {
      const int column = blockIdx.x * k.columns + t % k.columns;
      first = begin + t / k.columns, step = kThreads / k.columns;
      at = first * k.vectors + column;
      jump = step * k.vectors;
      run = 1, wrap = s = ds = 0;
      if (column >= k.vectors) first = end;
    } else {
      run = k.vectors;
      first = begin + t, step = kThreads;
      const i64 l = first / run;
      s = int(first - l * run), ds = kThreads % run;
      at = (l * k.C + blockIdx.x) * run + s;
      jump = i64(kThreads / run) * k.C * run + ds;
      wrap = i64(k.C - 1) * run;
    }
    left = first < end ? (unsigned long long)(end - first + step - 1) / unsigned(step) : 0;
  }

  __device__ void next() {
    at += jump, s += ds, --left;
    if (s >= run) s -= run, at += wrap;
  }
};

static __device__ int entries_of(const Call& k) { return k.columns ? k.C * k.S : k.C; }

// The channel of element j of this thread's vectors.
template <int V>
static __device__ int channel(const Call& k, int j) {
  if (!k.columns) return blockIdx.x;
  const unsigned column = (blockIdx.x * k.columns + threadIdx.x % k.columns) * V + j;
  const int c = k.S == 1 ? column : column / k.S;
  return c < k.C ? c : k.C - 1;  // a thread beyond the last column has nothing to do
}

// use(position, vectors of the A arrays), U positions at a time: their loads come first.
template <int U, int A, typename T, int V, typename Use>
static __device__ void take(Walk& w, const Pack<T, V>* const (&from)[A], Use& use) {
  Pack<T, V> v[U][A];
  i64 at[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    at[u] = w.at;
#pragma unroll
    for (int a = 0; a < A; ++a) v[u][a] = from[a][w.at];
    w.next();
  }
#pragma unroll
  for (int u = 0; u < U; ++u) use(at[u], v[u]);
}

template <int A, typename T, int V, typename Use, typename Flush>
static __device__ void along(Walk& w, const Pack<T, V>* const (&from)[A], Use use, Flush flush) {
  while (w.left > 0) {
    for (int r = 0; r < kRounds && w.left >= kUnroll; ++r) take<kUnroll>(w, from, use);
    while (w.left > 0 && w.left < kUnroll) take<1>(w, from, use);
    flush();
  }
}

template <typename T, int V>
static __device__ const Pack<T, V>* packs(const void* p) {
  return static_cast<const Pack<T, V>*>(p);
}
