// As much of CUDA's language as batch_norm.cu uses, for a C++ compiler: kernels run on a CPU, a
// block at a time, or several at the same time if CUDA_ON_CPU_BLOCKS_AT_ONCE says how many. The
// threads of a block are contexts that take turns between barriers; a block has one CPU thread.
//
// Under ThreadSanitizer it finds what is read and written with no barrier between, by threads of a
// block or of several: each context is a thread to it, whose order with others is that of barriers
// and fences.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __shared__ static thread_local
#define __noinline__
#define __launch_bounds__(n)

struct Triple {
  unsigned x = 0, y = 0, z = 0;
};
#define threadIdx cuda_on_cpu::of_thread()
#define blockIdx cuda_on_cpu::of_block()
#define gridDim cuda_on_cpu::of_grid()

namespace cuda_on_cpu {

constexpr size_t kStack = 65536;

inline thread_local Triple thread_at, block_at, grid;
inline Triple of_thread() { return thread_at; }
inline Triple of_block() { return block_at; }
inline Triple of_grid() { return grid; }

struct Thread {
  ucontext_t context;
  bool finished;
  unsigned barriers = 0, fences = 0;  // that it has come to
  void* fiber = nullptr;
};

inline thread_local ucontext_t scheduler;
inline thread_local void* scheduling;  // the scheduler's fiber
inline thread_local std::vector<Thread> threads;
inline thread_local std::vector<char> stacks;
inline thread_local const std::function<void()>* body;
inline thread_local unsigned running;

#ifdef __SANITIZE_THREAD__
inline char fences;
inline thread_local char ended, barriers[2];  // who leaves one may meet who comes to the next
inline void* here() { return __tsan_get_current_fiber(); }
inline void* born() { return __tsan_create_fiber(0); }
inline void gone(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void tell(void* what) { __tsan_release(what); }
inline void heed(void* what) { __tsan_acquire(what); }
// Not a function, as one would be entered in one fiber and left in another.
#define TO(fiber) __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync)
#else
inline char fences, ended, barriers[2];
inline void* here() { return nullptr; }
inline void* born() { return nullptr; }
inline void gone(void*) {}
inline void tell(void*) {}
inline void heed(void*) {}
#define TO(fiber) (void)(fiber)
#endif

inline void enter() {
  (*body)();
  threads[running].finished = true;
  tell(&ended);
  TO(scheduling);
  setcontext(&scheduler);
}

inline void run_block(unsigned count) {
  scheduling = here();
  threads.assign(count, Thread());
  stacks.resize(count * kStack);
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks.data() + t * kStack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    thread.finished = false, thread.fiber = born();
    makecontext(&thread.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (unsigned t = 0; t < count; ++t) {
      if (threads[t].finished) continue;
      running = t, thread_at = {t, 0, 0}, alive = true;
      TO(threads[t].fiber);
      swapcontext(&scheduler, &threads[t].context);
    }
  }
  for (Thread& thread : threads) gone(thread.fiber);
  heed(&ended);
}

inline void launch(unsigned gx, unsigned gy, unsigned count, const std::function<void()>& kernel) {
  // The last block comes first unless told otherwise: nothing may depend on an order of blocks.
  const bool first_first = std::getenv("CUDA_ON_CPU_FIRST_BLOCK_FIRST");
  const char* at_once = std::getenv("CUDA_ON_CPU_BLOCKS_AT_ONCE");
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    body = &kernel, grid = {gx, gy, 1};
    for (unsigned b; (b = next++) < gx * gy;) {
      const unsigned at = first_first ? b : gx * gy - 1 - b;
      block_at = {at % gx, at / gx, 0};
      run_block(count);
    }
  };
  if (!at_once) return work();
  std::vector<std::thread> workers;
  for (int i = std::atoi(at_once); i > 0; --i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  using namespace cuda_on_cpu;
  Thread& thread = threads[running];
  char* const barrier = &barriers[thread.barriers++ % 2];
  tell(barrier);
  TO(cuda_on_cpu::scheduling);
  swapcontext(&thread.context, &scheduler);
  heed(barrier);
}

// They come in pairs: what is before the one, and a count, is seen after a later count and the other.
inline void __threadfence() {
  using namespace cuda_on_cpu;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  threads[running].fences++ % 2 ? heed(&fences) : tell(&fences);
}

inline unsigned atomicInc(unsigned* at, unsigned most) {
  unsigned was = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &was, was >= most ? 0 : was + 1, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return was;
}

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
