// What the host does for a call on a GPU: cut the work into blocks, then launch two kernels.

#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>

#include "call.h"
#include "driver.h"

namespace scratchbn_gpu {

constexpr int kShortRun = 32;           // S below this: by columns
constexpr int kBlocksPerProcessor = 8;  // of kThreads, as many as a processor holds at once
constexpr int kWorthABlock = 4;         // vectors per thread below which more blocks cost more
constexpr int kMostColumns = 32;        // vectors side by side
constexpr int kMostSplits = 65535;      // of gridDim.y
constexpr int kWorthAChunk = 2048;      // sums of a team that one block does not add up alone

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
    stream("moments");
    if (!empty()) stream("transform");
  }

  void backward() {
    stream("gradient_sums");
    if (!empty() && call_.dx) stream("gradient");
  }

  static void check_sizes(int64_t L, int64_t C, int64_t S) {
    if (L > INT_MAX || C * S > INT_MAX) throw DriverError("the kernels do not count that far");
  }

 private:
  bool empty() const { return call_.L == 0 || call_.S == 0; }

  void cut() {
    call_.splits = call_.width = call_.chunk = call_.team = 1;
    across_ = unsigned(call_.C);
    if (empty()) return;
    call_.share = 1 / (double(call_.L) * call_.S);
    const bool by_columns = call_.S < kShortRun;
    const int row = by_columns ? call_.C * call_.S : call_.S;
    vector_ = row % type_.width == 0 && aligned() ? type_.width : 1;
    call_.vectors = row / vector_;
    if (by_columns) {
      call_.columns = power_of_two(call_.vectors, kMostColumns);
      call_.width = call_.columns * vector_;
      call_.team = call_.S / std::gcd(call_.S, call_.width);
      across_ = unsigned(ceil_div(call_.vectors, call_.columns));
    }
    const int64_t all = by_columns ? call_.L : int64_t(call_.L) * call_.vectors;
    const int64_t at_once = by_columns ? kThreads / call_.columns : kThreads;
    const int64_t wanted = ceil_div(kBlocksPerProcessor * device_.processors(), across_);
    const int64_t most = std::min<int64_t>(ceil_div(all, at_once * kWorthABlock), kMostSplits);
    call_.splits = int(std::max<int64_t>(std::min(wanted, most), 1));
    call_.each = ceil_div(all, call_.splits);
    if (int64_t(call_.splits) * call_.team * call_.width > kWorthAChunk) {
      call_.chunk = power_of_two(int64_t(std::sqrt(call_.splits)), call_.splits);
    }
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
    if (bytes > INT_MAX) throw DriverError("partial sums of so many channels take over 2 GiB");
    char* memory = static_cast<char*>(place_.allocate(int(bytes)));
    if (!memory) throw DriverError("no memory for partial sums");
    call_.partial = reinterpret_cast<double*>(memory);
    call_.lines = memory + sums;
    const int64_t teams = ceil_div(across_, call_.team);
    const int64_t chunks = call_.chunk > 1 ? ceil_div(call_.splits, call_.chunk) * across_ : 0;
    call_.arrived = device_.zeros(place_.stream, size_t(chunks + teams));
  }

  void stream(const char* kernel) const {
    const std::string name =
        std::string(kernel) + "_" + type_.name + "_" + std::to_string(vector_);
    device_.launch(name, across_, unsigned(call_.splits), kThreads, place_.stream, &call_);
  }

  Call call_;
  const Type type_;
  const Place& place_;
  const Device& device_;
  int vector_ = 1;  // elements of one
  unsigned across_ = 1;
};

}  // namespace scratchbn_gpu
