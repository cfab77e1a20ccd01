// libcudnn.so.8: sizes are answered as cuDNN 8.9.6 answers them, what computes is noted down.
#include "journal.h"

using namespace rehearsal;

namespace {

struct Algorithm {
  int algorithm, status;
  float time;
  size_t memory;
  int deterministic, math, reserved[3];
};

int one_algorithm(int* count, void* results) {
  *count = 1;
  *static_cast<Algorithm*>(results) = {1, 0, 1.0f, 1024, 1, 0, {}};
  return 0;
}

}  // namespace

API size_t cudnnGetVersion() { return 8906; }
API const char* cudnnGetErrorString(int) { return "an error of the rehearsal's cuDNN"; }

API int cudnnDropoutGetStatesSize(void*, size_t* bytes) { return *bytes = 1024, 0; }
// One bit for each element, in words of 4 bytes, as the real library asks for one element.
API int cudnnDropoutGetReserveSpaceSize(void*, size_t* bytes) { return *bytes = 4, 0; }

#define CONVOLUTION(direction)                                                                   \
  API int cudnnGetConvolution##direction##AlgorithmMaxCount(void*, int* count) {                 \
    return *count = 1, 0;                                                                        \
  }                                                                                              \
  API int cudnnGetConvolution##direction##Algorithm_v7(void*, void*, void*, void*, void*, int,   \
                                                       int* count, void* results) {              \
    return one_algorithm(count, results);                                                        \
  }                                                                                              \
  API int cudnnFindConvolution##direction##Algorithm(void*, void*, void*, void*, void*, int,     \
                                                     int* count, void* results) {                \
    return one_algorithm(count, results);                                                        \
  }                                                                                              \
  API int cudnnGetConvolution##direction##WorkspaceSize(void*, void*, void*, void*, void*, int,  \
                                                        size_t* bytes) {                         \
    return *bytes = 1024, 0;                                                                     \
  }
CONVOLUTION(Forward)
CONVOLUTION(BackwardData)
CONVOLUTION(BackwardFilter)
