// As much of CUDA's language as batch_norm.cu uses, for a C++ compiler: kernels run on a CPU, a
// block at a time. The threads of a block are contexts that take turns between barriers, so that
// every run is the same.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __noinline__
#define __launch_bounds__(n)

struct Triple {
  unsigned x = 0, y = 0, z = 0;
};
inline Triple threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

constexpr size_t kStack = 65536;

inline ucontext_t scheduler;
inline std::vector<ucontext_t> threads;
inline std::vector<char> stacks;
inline std::vector<char> finished;
inline const std::function<void()>* body;
inline unsigned running;

inline void enter() {
  (*body)();
  finished[running] = true;
}

inline void run_block(unsigned count) {
  threads.resize(count), stacks.resize(count * kStack);
  finished.assign(count, false);
  for (unsigned t = 0; t < count; ++t) {
    getcontext(&threads[t]);
    threads[t].uc_stack.ss_sp = stacks.data() + t * kStack;
    threads[t].uc_stack.ss_size = kStack;
    threads[t].uc_link = &scheduler;
    makecontext(&threads[t], enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (unsigned t = 0; t < count; ++t) {
      if (finished[t]) continue;
      running = t, threadIdx = {t, 0, 0}, alive = true;
      swapcontext(&scheduler, &threads[t]);
    }
  }
}

inline void launch(unsigned gx, unsigned gy, unsigned count, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = {gx, gy, 1};
  for (unsigned b = 0; b < gx * gy; ++b) {
    // The last block comes first unless told otherwise: nothing may depend on an order of blocks.
    const unsigned at = std::getenv("CUDA_ON_CPU_FIRST_BLOCK_FIRST") ? b : gx * gy - 1 - b;
    blockIdx = {at % gx, at / gx, 0};
    run_block(count);
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  swapcontext(&cuda_on_cpu::threads[cuda_on_cpu::running], &cuda_on_cpu::scheduler);
}

// Blocks come one after another, and so do the threads of a block: what is written is seen at once.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned more) { return (*at += more) - more; }

// float16, rounded to the nearest, ties to even.
inline float half_to_float(unsigned short h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float size = exponent == 0    ? std::ldexp(float(fraction), -24)
                     : exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp(float(1024 + fraction), exponent - 25);
  return h & 0x8000 ? -size : size;
}

inline unsigned short float_to_half(float f) {
  const unsigned short sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (size == 0) return sign;
  if (size != size) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // the last place
  const int places = int(std::nearbyint(std::ldexp(size, -unit)));
  if (unit == -24) return sign | places;  // also where it rounds up to the first normal number
  return sign | (((unit + 24) << 10) + places);
}
