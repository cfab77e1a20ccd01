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
// The channels, or by columns the elements of a row, are the entries: a block leaves two sums for
// each of its `width` entries in `partial`. The last block of `chunk` splits that is done adds up
// theirs, the last block of a team all that is left of it. A team is one block wide, or by columns
// as many as it takes until the end of a block is the end of a channel.
struct Call {
  int L, C, S;
  int vectors;     // of a run; by columns, of a row
  int columns;     // a power of two up to 32, or 0
  int splits;      // gridDim.y
  long long each;  // vectors of a channel, or by columns rows, that a split has
  int width;       // entries of a block: a power of two; by runs 1
  int chunk;       // splits that are added up first; 1: none
  int team;        // blocks side by side whose channels are finished together
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
  double* partial;                    // two sums for each split and entry
  unsigned* arrived;                  // zeros: how many blocks of a chunk, of a team are done
  void* lines;                        // W: (2, C) forward, mean and variance; (3, C) backward
};
static_assert(sizeof(Call) == 216 && alignof(Call) == 8, "as host and device have to see it");

}  // namespace scratchbn_gpu
