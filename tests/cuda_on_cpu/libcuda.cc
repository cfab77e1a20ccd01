// A driver, libcuda.so.1, for one card that is this CPU: its memory is the host's, and its kernels
// are those of batch_norm.cu, compiled into this library. Launches are noted down.
#include "cuda_on_cpu.h"
// after it: what the kernels are written in
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "batch_norm.cu"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Kernel = void (*)(Call);
#define NAMED(name) {#name, name}
#define STREAMING_OF(type, V)                                                         \
  NAMED(moments_##type##_##V), NAMED(transform_##type##_##V),                         \
      NAMED(gradient_sums_##type##_##V), NAMED(gradient_##type##_##V)
#define KERNELS_OF(type, V) STREAMING_OF(type, 1), STREAMING_OF(type, V)

const std::map<std::string, Kernel> kernels = {
    KERNELS_OF(half, 4), KERNELS_OF(float, 4), KERNELS_OF(double, 2)};

enum {
  kInvalidImage = 200, kInvalidContext = 201, kNoBinary = 209, kNotFound = 500, kNotZero = 999
};

std::mutex mutex;
std::string noted;
int depth = 0;  // of contexts
int context, module;
std::vector<std::vector<char>> taken;  // for counters, which are zeros between kernels

bool all_zero() {
  for (const auto& memory : taken) {
    for (const char byte : memory) {
      if (byte) return false;
    }
  }
  return true;
}

int number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

int capability() { return number("CUDA_ON_CPU_CAPABILITY", 80); }
int devices() { return number("CUDA_ON_CPU_DEVICES", 1); }

// A card takes machine code of its generation that is not newer than itself, and PTX that is not.
int status_of(const char* image) {
  const bool binary = std::strncmp(image, "\x7f" "ELF", 4) == 0;
  const char* target = binary ? nullptr : std::strstr(image, ".target sm_");
  if (!binary && !target) return kInvalidImage;
  const int made_for = binary ? static_cast<unsigned char>(image[48])  // e_flags
                              : std::atoi(target + std::strlen(".target sm_"));
  const bool alike = !binary || made_for / 10 == capability() / 10;
  return alike && made_for <= capability() ? 0 : kNoBinary;
}

}  // namespace

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) { return *version = 11080, 0; }
API int cuDeviceGetCount(int* count) { return *count = devices(), 0; }
API int cuDeviceGet(int* device, int index) { return *device = index, index < devices() ? 0 : 101; }
API int cuDeviceGetName(char* name, int size, int) {
  return std::snprintf(name, size_t(size), "this CPU"), 0;
}
API int cuGetErrorString(int status, const char** text) {
  *text = status == kInvalidImage ? "invalid image"
          : status == kNoBinary   ? "no kernel image for the device"
          : status == kNotZero    ? "counters that are not zero"
                                  : "error of the stand-in";
  return 0;
}
API int cuDeviceGetAttribute(int* value, int which, int) {
  *value = which == 16   ? number("CUDA_ON_CPU_PROCESSORS", 8)
           : which == 75 ? capability() / 10
           : which == 76 ? capability() % 10
                         : 0;
  return 0;
}
API int cuDevicePrimaryCtxRetain(void** of, int) { return *of = &context, 0; }
API int cuCtxPushCurrent_v2(void* pushed) {
  if (pushed != &context) return kInvalidContext;
  return ++depth, 0;
}
API int cuCtxPopCurrent_v2(void** popped) { return --depth, *popped = &context, 0; }
API int cuMemAlloc_v2(unsigned long long* memory, size_t bytes) {
  if (depth == 0) return kInvalidContext;
  taken.emplace_back(bytes, '\xff');
  return *memory = reinterpret_cast<unsigned long long>(taken.back().data()), 0;
}
API int cuMemsetD8Async(unsigned long long memory, unsigned char value, size_t bytes, void*) {
  if (depth == 0) return kInvalidContext;
  return std::memset(reinterpret_cast<void*>(memory), value, bytes), 0;
}
API int cuModuleLoadData(void** loaded, const void* image) {
  if (depth == 0) return kInvalidContext;
  return *loaded = &module, status_of(static_cast<const char*>(image));
}
API int cuModuleGetFunction(void** function, void* of, const char* name) {
  const auto found = kernels.find(name);
  if (of != &module || found == kernels.end()) return kNotFound;
  *function = const_cast<std::pair<const std::string, Kernel>*>(&*found);
  return 0;
}
API int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                       unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments,
                       void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (depth == 0) return kInvalidContext;
  if (gx == 0 || gy == 0 || gz != 1 || bx != kThreads || by != 1 || bz != 1 || shared) return 1;
  const auto& kernel = *static_cast<std::pair<const std::string, Kernel>*>(function);
  const Call& call = *static_cast<const Call*>(arguments[0]);
  char line[512];
  std::snprintf(line, sizeof line, "%s grid=%ux%u stream=%p x=%p dy=%p y=%p dx=%p kept=%p flag=%p\n",
                kernel.first.c_str(), gx, gy, stream, call.x, call.dy, call.y, call.dx, call.kept,
                static_cast<const void*>(call.flag));
  noted += line;
  if (!all_zero()) return kNotZero;
  cuda_on_cpu::launch(gx, gy, bx, [&] { kernel.second(call); });
  return all_zero() ? 0 : kNotZero;
}

// What was launched since the last call, a line each.
API const char* launches() {
  const std::lock_guard<std::mutex> lock(mutex);
  static std::string taken;
  taken.swap(noted);
  noted.clear();
  return taken.c_str();
}
