// libcudart.so.11.0: memory and copies are real, kernels are only noted down.
#include <algorithm>

#include "journal.h"

using namespace rehearsal;

namespace {

struct Size { unsigned x, y, z; };

// The head of cudaDeviceProp of CUDA 11, as far as MXNet reads it; the whole has 728 bytes.
struct Properties {
  char name[256];
  char identity[32];
  size_t global_memory, shared_memory_of_block;
  int registers_of_block, warp;
  size_t pitch;
  int threads_of_block, block[3], grid[3], clock;
  size_t constant_memory;
  int major, minor;
  size_t alignment[2];
  int overlap, processors;
};
static_assert(sizeof(Properties) <= 728, "longer than cudaDeviceProp");

struct Launch { Size grid, block; size_t shared; void* stream; };
thread_local Launch configured;
thread_local int current = 0;

struct Kernel { std::string name, signature; std::vector<std::string> types; };
std::mutex guard;

std::map<const void*, Kernel>& kernels() {
  static auto* const known = new std::map<const void*, Kernel>;
  return *known;
}

int attribute(int which) {
  switch (which) {
    case 1: case 2: case 3: return 1024;  // threads of a block, x, y
    case 4: return 64;
    case 5: return 2147483647;  // blocks of a grid, x, y, z
    case 6: case 7: return 65535;
    case 8: return 49152;  // shared memory of a block
    case 10: return 32;
    case 12: return 65536;  // registers of a block
    case 16: return 108;  // processors
    case 39: return 2048;  // threads of a processor
    case 75: return capability() / 10;
    case 76: return capability() % 10;
    case 81: return 167936;  // shared memory of a processor
    default: return 1;
  }
}

std::string size(const Size& grid, const Size& block) {
  return format("grid=%ux%ux%u block=%ux%ux%u", grid.x, grid.y, grid.z, block.x, block.y, block.z);
}

}  // namespace

API void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(handle()); }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
  std::lock_guard<std::mutex> lock(guard);
  kernels()[host].name = name;
}
API unsigned __cudaPushCallConfiguration(Size grid, Size block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
API int __cudaPopCallConfiguration(Size* grid, Size* block, size_t* shared, void** stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared = configured.shared;
  *stream = configured.stream;
  return 0;
}

API int cudaLaunchKernel(const void* function, Size grid, Size block, void** arguments, size_t,
                         void*) {
  if (grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z == 0) {
    note("REFUSED\t" + kernels()[function].name + "\t" + size(grid, block));
    return 9;  // invalid configuration: what a card says to an empty grid
  }
  if (journal() < 0) return 0;
  std::lock_guard<std::mutex> lock(guard);
  Kernel& kernel = kernels()[function];
  if (kernel.signature.empty()) {
    kernel.signature = demangled(kernel.name);
    kernel.types = parameters(kernel.signature);
  }
  note("KERNEL\t" + kernel.name + "\t" + size(grid, block) + "\t" +
       pointers(kernel.types, arguments) + "\t" + kernel.signature);
  return 0;
}

API int cudaMalloc(void** memory, size_t bytes) { return allocate(memory, bytes); }
API int cudaMallocPitch(void** memory, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate(memory, *pitch * height);
}
API int cudaHostAlloc(void** memory, size_t bytes, unsigned) { return allocate(memory, bytes); }
API int cudaFree(void* memory) { return std::free(memory), 0; }
API int cudaFreeHost(void* memory) { return std::free(memory), 0; }
API int cudaMemGetInfo(size_t* free_bytes, size_t* all) {
  *free_bytes = size_t(30) << 30;
  *all = size_t(40) << 30;
  return 0;
}

static int copy(void* to, const void* from, size_t bytes) {
  note("COPY\tmemcpy\tbytes=" + std::to_string(bytes) + "\t" + pointer(to, false) + " " +
       pointer(from, true));
  if (bytes) std::memmove(to, from, bytes);
  return 0;
}
API int cudaMemcpy(void* to, const void* from, size_t n, int) { return copy(to, from, n); }
API int cudaMemcpyAsync(void* to, const void* from, size_t n, int, void*) {
  return copy(to, from, n);
}
API int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, void*) {
  return copy(to, from, n);
}
API int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                          size_t width, size_t height, int, void*) {
  note("COPY\tmemcpy2d\tbytes=" + std::to_string(width * height) + "\t" + pointer(to, false) +
       " " + pointer(from, true));
  for (size_t i = 0; i < height; ++i) {
    std::memmove(static_cast<char*>(to) + i * to_pitch,
                 static_cast<const char*>(from) + i * from_pitch, width);
  }
  return 0;
}
API int cudaMemsetAsync(void* memory, int value, size_t bytes, void*) {
  note("SET\tmemset\tbytes=" + std::to_string(bytes) + "\t" + pointer(memory, false));
  if (bytes) std::memset(memory, value, bytes);
  return 0;
}

API int cudaGetDeviceCount(int* count) { return *count = devices(), 0; }
API int cudaGetDevice(int* device) { return *device = current, 0; }
API int cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return 101;  // invalid device
  return current = device, 0;
}
API int cudaDriverGetVersion(int* version) { return *version = 12000, 0; }
API int cudaDeviceSynchronize() { return 0; }
API int cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, 0; }
API int cudaDeviceEnablePeerAccess(int, unsigned) { return 0; }
API int cudaDeviceGetP2PAttribute(int* value, int, int, int) { return *value = 0, 0; }
API int cudaDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), 0; }
API int cudaGetDeviceProperties(void* memory, int) {
  std::memset(memory, 0, 728);
  Properties& found = *static_cast<Properties*>(memory);
  std::strcpy(found.name, "rehearsal");
  found.global_memory = size_t(40) << 30;
  found.shared_memory_of_block = attribute(8);
  found.registers_of_block = attribute(12);
  found.warp = attribute(10);
  found.threads_of_block = attribute(1);
  for (int i = 0; i < 3; ++i) {
    found.block[i] = attribute(2 + i);
    found.grid[i] = attribute(5 + i);
  }
  found.major = attribute(75);
  found.minor = attribute(76);
  found.processors = attribute(16);
  return 0;
}

API int cudaStreamCreate(void** stream) { return *stream = handle(), 0; }
API int cudaStreamDestroy(void* stream) { return std::free(stream), 0; }
API int cudaStreamSynchronize(void*) { return 0; }
API int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
API int cudaEventCreateWithFlags(void** event, unsigned) { return *event = handle(), 0; }
API int cudaEventDestroy(void* event) { return std::free(event), 0; }
API int cudaEventRecord(void*, void*) { return 0; }

API int cudaFuncGetAttributes(void* attributes, const void*) {
  // sharedSizeBytes, constSizeBytes, localSizeBytes, then ints from maxThreadsPerBlock on.
  std::memset(attributes, 0, 56);
  int* const numbers = reinterpret_cast<int*>(static_cast<char*>(attributes) + 24);
  numbers[0] = 1024;
  numbers[1] = 32;
  numbers[2] = numbers[3] = capability();
  return 0;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                               size_t, unsigned) {
  return *blocks = 2, 0;
}
API int cudaGetLastError() { return 0; }
API int cudaPeekAtLastError() { return 0; }
API const char* cudaGetErrorName(int) { return "an error of the rehearsal"; }
API const char* cudaGetErrorString(int) { return "an error of the rehearsal's stand-ins"; }
