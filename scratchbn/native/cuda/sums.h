// Sums over all blocks of a launch, in an order that the shape fixes.

#pragma once

#include "walk.h"

struct Pair {
  double a, b;
};

// Adds up pairs over the threads of a block that are `width`, a power of two, apart; the sums are
// in the threads before `width`.
static __device__ __noinline__ Pair fold(Pair own, int width) {
  __shared__ Pair all[kThreads];
  const int t = threadIdx.x;
  __syncthreads();
  all[t] = own;
  __syncthreads();
  for (int step = kThreads / 2; step >= width; step /= 2) {
    if (t < step) all[t].a += all[t + step].a, all[t].b += all[t + step].b;
    __syncthreads();
  }
  return all[t];
}

// Where a block, or a chunk of splits, leaves two sums of an entry.
static __device__ double* left_for(const Call& k, int split, int entry) {
  return k.partial + 2 * (i64(split) * entries_of(k) + entry);
}

// Adds up what the threads of a block have for each entry, and leaves it.
template <int V>
static __device__ void leave(const Call& k, double (&a)[V], double (&b)[V]) {
  const int t = threadIdx.x, width = k.columns ? k.columns : 1;
  if (!k.columns) {
#pragma unroll
    for (int j = 1; j < V; ++j) a[0] += a[j], b[0] += b[j];
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j > 0 && !k.columns) break;
    const Pair sums = fold({a[j], b[j]}, width);
    const int entry = k.columns ? (blockIdx.x * width + t) * V + j : blockIdx.x;
    if (t < width && entry < entries_of(k)) {
      double* out = left_for(k, blockIdx.y, entry);
      out[0] = sums.a, out[1] = sums.b;
    }
  }
}

// Tells the last of `expected` blocks that arrive here that it is the last: it then sees what the
// others wrote before. Its arrival sets the counter back to 0. What it reads of the others must be
// volatile, as a multiprocessor's cache may hold what was there before.
static __device__ bool is_last(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  if (expected == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, expected - 1) == expected - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// The sums of the channels that a block finishes, one in each of the threads that are `valid`.
struct Gathered {
  bool valid;
  int c;
  Pair sum;
};

// The channels of the team of this block: `team` blocks side by side, see call.h.
struct Team {
  int index, first, channels;
  unsigned blocks;

  __device__ explicit Team(const Call& k) {
    const int groups = gridDim.x, at = blockIdx.x / k.team * k.team;
    index = blockIdx.x / k.team;
    blocks = groups - at < k.team ? groups - at : k.team;
    const i64 width = i64(k.team) * k.width, begin = index * width, all = entries_of(k);
    const i64 end = begin + width < all ? begin + width : all;
    const int each = k.columns ? k.S : 1;
    first = int(begin / each), channels = int((end - begin) / each);
  }
};

// Adds up what all blocks have left; false in the blocks that were not the last to do so. A chunk's
// splits are added up by its last block, then a team's chunks by the team's.
static __device__ bool gather(const Call& k, Gathered& sums) {
  const int t = threadIdx.x, chunks = (k.splits + k.chunk - 1) / k.chunk;
  const Team team(k);
  unsigned* counters = k.arrived;
  if (k.chunk > 1) {
    const int chunk = blockIdx.y / k.chunk, begin = chunk * k.chunk;
    const int end = begin + k.chunk < k.splits ? begin + k.chunk : k.splits;
    if (!is_last(counters + chunk * gridDim.x + blockIdx.x, unsigned(end - begin))) return false;
    counters += chunks * gridDim.x;
    const int entry = blockIdx.x * k.width + t % k.width;
    Pair sum = {0, 0};
    if (entry < entries_of(k)) {
      for (int i = begin + t / k.width; i < end; i += kThreads / k.width) {
        const volatile double* in = left_for(k, i, entry);
        sum.a += in[0], sum.b += in[1];
      }
    }
    sum = fold(sum, k.width);
    if (t < k.width && entry < entries_of(k)) {
      double* out = left_for(k, begin, entry);
      out[0] = sum.a, out[1] = sum.b;
    }
  }
  if (!is_last(counters + team.index, team.blocks * unsigned(chunks))) return false;
  int side = 1;  // channels side by side
  while (side < team.channels) side *= 2;
  const int each = k.columns ? k.S : 1, count = each * chunks;
  sums.c = team.first + t % side, sums.sum = {0, 0};
  if (t % side < team.channels) {
    for (int i = t / side; i < count; i += kThreads / side) {
      const volatile double* in = left_for(k, i / each * k.chunk, sums.c * each + i % each);
      sums.sum.a += in[0], sums.sum.b += in[1];
    }
  }
  sums.sum = fold(sums.sum, side);
  sums.valid = t < team.channels;
  return true;
}
