// libcublas.so.11: math modes and products are noted down. Mode 3 lets float32 be rounded to TF32.
#include "journal.h"

using namespace rehearsal;

namespace {

std::string extent(int m, int n, int k) { return format("m=%d n=%d k=%d", m, n, k); }

std::string arrays(const void* c, const void* a, const void* b) {
  return pointer(c, false) + " " + pointer(a, true) + " " + pointer(b, true);
}

thread_local std::map<void*, int> modes;

std::string in_mode(void* handle) { return format(" mode=%d", modes[handle]); }

}  // namespace

API int cublasCreate_v2(void** created) { return *created = handle(), 0; }
API int cublasDestroy_v2(void* created) { return std::free(created), 0; }
API int cublasSetStream_v2(void*, void*) { return 0; }
API int cublasSetPointerMode_v2(void*, int) { return 0; }
API int cublasGetMathMode(void* handle, int* mode) { return *mode = modes[handle], 0; }
API int cublasSetMathMode(void* handle, int mode) {
  note("MODE\tcublasSetMathMode\tmode=" + std::to_string(mode));
  return modes[handle] = mode, 0;
}

#define PRODUCT(name)                                                                            \
  API int name(void* handle, int, int, int m, int n, int k, const void*, const void* a, int,     \
               const void* b, int, const void*, void* c, int) {                                  \
    note("CALL\t" #name "\t" + extent(m, n, k) + in_mode(handle) + "\t" + arrays(c, a, b));      \
    return 0;                                                                                    \
  }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)

#define BATCHED_PRODUCT(name)                                                                    \
  API int name(void* handle, int, int, int m, int n, int k, const void*, const void* a, int,     \
               long long, const void* b, int, long long, const void*, void* c, int, long long,   \
               int) {                                                                            \
    note("CALL\t" #name "\t" + extent(m, n, k) + in_mode(handle) + "\t" + arrays(c, a, b));      \
    return 0;                                                                                    \
  }
BATCHED_PRODUCT(cublasSgemmStridedBatched)
BATCHED_PRODUCT(cublasDgemmStridedBatched)
BATCHED_PRODUCT(cublasHgemmStridedBatched)

#define TYPED_PRODUCT(name)                                                                      \
  API int name(void* handle, int, int, int m, int n, int k, const void*, const void* a, int,     \
               int, const void* b, int, int, const void*, void* c, int, int) {                   \
    note("CALL\t" #name "\t" + extent(m, n, k) + in_mode(handle) + "\t" + arrays(c, a, b));      \
    return 0;                                                                                    \
  }
TYPED_PRODUCT(cublasSgemmEx)
TYPED_PRODUCT(cublasGemmEx)
