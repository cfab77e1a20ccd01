// What every kernel of batch_norm.cu is given: one struct, so that a launch has one argument. Host
// and device compile this file, with different compilers.

#pragma once

namespace scratchbn_gpu {

constexpr int kThreads = 256;  // of a block

// An array is seen as L positions before the channel axis, C channels, S positions after it, and
// read in vectors of V elements; C * S fits an int. Work is cut into gridDim.x x `splits` blocks:
//   by runs, if S is long (`columns` is 0): block x takes channel x, L runs of S neighbours;
//   by columns, if S is short (channels-last, dense layers): the array is a matrix of L rows, and
//   a block takes `columns` vectors side by side.
// Each block leaves two sums per channel, or per column, in `partial`.
struct Call {
  int L, C, S;
  int vectors;     // of a run; by columns, of a row
  int columns;     // a power of two up to 32, or 0
  int splits;      // gridDim.y
  long long each;  // vectors of a channel, or by columns rows, that a split has
  int group;       // threads that add up the partial sums of one channel: a power of two
  int relu, cumulative, unbiased;
  double epsilon, momentum;
  double share;  // of an element in a mean: 1 / (L * S)

  // T is the type of the data, W that of statistics: float for float16, else T.
  const void *x, *gamma, *beta;       // T, W, W; null gamma: 1, null beta: 0
  void *running_mean, *running_var;   // W
  void* num_batches;                  // W, shape (1,); null unless cumulative
  const float* flag;                  // 1: inference
  void *kept, *token, *y;             // W (3, C): high, low, 1 / std; W (C,); T
  const void* dy;                     // T
  void *dx, *dgamma, *dbeta;          // T, W, W; null: not wanted
  double* partial;                    // two sums for each split and channel, or column
  void* lines;                        // W: (2, C) forward, mean and variance; (3, C) backward
};

}  // namespace scratchbn_gpu
