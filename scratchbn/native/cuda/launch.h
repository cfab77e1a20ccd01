// What the host does for a call on a GPU: cut the work into blocks, then launch three kernels.

#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <functional>
#include <string>

#include "call.h"
#include "driver.h"

namespace scratchbn_gpu {

constexpr int kShortRun = 32;           // S below this: by columns
constexpr int kBlocksPerProcessor = 8;  // of kThreads, as many as a processor holds at once
constexpr int kWorthABlock = 4;         // vectors per thread below which more blocks cost more
constexpr int kMostColumns = 32;        // vectors side by side
constexpr int kMostSplits = 65535;      // of gridDim.y

// The types of the data: how kernels call them, and their sizes.
struct Type {
  const char* name;
  int size, statistics;  // bytes of an element, of a statistic
  int width;             // elements of a vector
};
constexpr Type kHalf{"half", 2, 4, 4}, kSingle{"float", 4, 4, 4}, kDouble{"double", 8, 8, 2};

// Where the call computes: `allocate(bytes)` gives memory of the device for as long as it lasts.
struct Place {
  int device;
  void* stream;
  std::function<void*(int)> allocate;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

// One call; `call` comes with its options, sizes and arrays set, and not empty of channels.
class Launcher {
 public:
  Launcher(const Call& call, const Type& type, const Place& place)
      : call_(call), type_(type), place_(place), device_(Device::get(place.device)) {
    cut();
    allocate();
  }

  void forward() {
    if (!empty()) stream("moments");
    finish("finish_forward");
    if (!empty()) stream("transform");
  }

  void backward() {
    if (!empty()) stream("gradient_sums");
    finish("finish_backward");
    if (!empty() && call_.dx) stream("gradient");
  }

  static void check_sizes(int64_t L, int64_t C, int64_t S) {
    if (L > INT_MAX || C * S > INT_MAX) throw std::invalid_argument("");
  }

 private:
  bool empty() const { return call_.L == 0 || call_.S == 0; }

  void cut() {
    call_.splits = call_.group = 1;
    if (empty()) return;
    call_.share = 1 / (double(call_.L) * call_.S);
    const bool by_columns = call_.S < kShortRun;
    const int row = by_columns ? call_.C * call_.S : call_.S;
    width_ = row % type_.width == 0 && aligned() ? type_.width : 1;
    call_.vectors = row / width_;
    call_.columns = by_columns ? power_of_two(call_.vectors, kMostColumns) : 0;
    across_ = by_columns ? unsigned(ceil_div(call_.vectors, call_.columns)) : unsigned(call_.C);
    const int64_t all = by_columns ? call_.L : int64_t(call_.L) * call_.vectors;
    const int64_t at_once = by_columns ? kThreads / call_.columns : kThreads;
    const int64_t wanted = ceil_div(kBlocksPerProcessor * device_.processors(), across_);
    const int64_t most = std::min<int64_t>(ceil_div(all, at_once * kWorthABlock), kMostSplits);
    call_.splits = int(std::max<int64_t>(std::min(wanted, most), 1));
    call_.each = ceil_div(all, call_.splits);
    const int64_t partials = int64_t(call_.splits) * (by_columns ? call_.S : 1);
    call_.group = power_of_two(ceil_div(partials, 4), kThreads);
  }

  bool aligned() const {
    const uintptr_t bits = uintptr_t(call_.x) | uintptr_t(call_.y) | uintptr_t(call_.dy) |
                           uintptr_t(call_.dx);
    return bits % uintptr_t(type_.size * type_.width) == 0;
  }

  void allocate() {
    const int64_t entries = int64_t(call_.C) * (call_.columns ? call_.S : 1);
    const int64_t sums = int64_t(call_.splits) * entries * 2 * int64_t(sizeof(double));
    const int64_t bytes = sums + int64_t(3) * call_.C * type_.statistics;
    if (bytes > INT_MAX) throw std::invalid_argument("");
    char* memory = static_cast<char*>(place_.allocate(int(bytes)));
    if (!memory) throw DriverError("no memory for partial sums");
    call_.partial = reinterpret_cast<double*>(memory);
    call_.lines = memory + sums;
  }

  void stream(const char* kernel) const {
    launch(std::string(kernel) + "_" + type_.name + "_" + std::to_string(width_), across_,
           unsigned(call_.splits));
  }

  void finish(const char* kernel) const {
    launch(std::string(kernel) + "_" + type_.name,
           unsigned(ceil_div(call_.C, kThreads / call_.group)), 1);
  }

  void launch(const std::string& kernel, unsigned gx, unsigned gy) const {
    device_.launch(kernel, gx, gy, kThreads, place_.stream, &call_);
  }

  Call call_;
  const Type type_;
  const Place& place_;
  const Device& device_;
  int width_ = 1;
  unsigned across_ = 1;
};

}  // namespace scratchbn_gpu
