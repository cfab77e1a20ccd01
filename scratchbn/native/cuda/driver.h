// The CUDA driver, found at run time: no CUDA is needed to build this, or to load it where no GPU
// is. Names and numbers are those of NVIDIA's driver API.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

// What lives as long as the process is never destroyed: MXNet's threads may still be at work while
// the process ends.

namespace scratchbn_gpu {

// What the user is told.
struct DriverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Driver {
 public:
  static const Driver& get() {
    static const Driver& driver = *new Driver;
    return driver;
  }

  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxPushCurrent)(void*);
  int (*cuCtxPopCurrent)(void**);
  int (*cuMemAlloc)(unsigned long long*, size_t);
  int (*cuMemsetD8Async)(unsigned long long, unsigned char, size_t, void*);
  int (*cuModuleLoadData)(void**, const void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        void*, void**, void**);

  // Throws if a call of the driver failed.
  void require(int status, const char* what) const {
    if (status == 0) return;
    const char* meaning = nullptr;
    cuGetErrorString_(status, &meaning);
    throw DriverError(std::string(what) + ": CUDA error " + std::to_string(status) + ", " +
                      (meaning ? meaning : "unknown"));
  }

 private:
  Driver() {
    const char* chosen = std::getenv("SCRATCHBN_LIBCUDA");  // a stand-in, in tests
    library_ = dlopen(chosen ? chosen : "libcuda.so.1", RTLD_LAZY);
    if (!library_) throw DriverError(std::string("no NVIDIA driver: ") + dlerror());
    int (*cuInit)(unsigned) = nullptr;
    find(cuInit, "cuInit");
    find(cuGetErrorString_, "cuGetErrorString");
    find(cuDeviceGet, "cuDeviceGet");
    find(cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(cuCtxPushCurrent, "cuCtxPushCurrent_v2");
    find(cuCtxPopCurrent, "cuCtxPopCurrent_v2");
    find(cuMemAlloc, "cuMemAlloc_v2");
    find(cuMemsetD8Async, "cuMemsetD8Async");
    find(cuModuleLoadData, "cuModuleLoadData");
    find(cuModuleGetFunction, "cuModuleGetFunction");
    find(cuLaunchKernel, "cuLaunchKernel");
    require(cuInit(0), "cuInit");
  }

  template <typename F>
  void find(F& f, const char* name) const {
    f = reinterpret_cast<F>(dlsym(library_, name));
    if (!f) throw DriverError(std::string("the NVIDIA driver lacks ") + name);
  }

  void* library_;
  int (*cuGetErrorString_)(int, const char**);
};

// The context that MXNet and all others in the process use on a device is current while this lives.
class Current {
 public:
  explicit Current(void* context) {
    Driver::get().require(Driver::get().cuCtxPushCurrent(context), "cuCtxPushCurrent");
  }
  ~Current() {
    void* context = nullptr;
    Driver::get().cuCtxPopCurrent(&context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// The code of the kernels, by the compute capability it is for (8.6 is 86): a cubin or PTX.
class Images {
 public:
  static Images& get() {
    static Images& images = *new Images;
    return images;
  }

  void add(int capability, const void* data, size_t size) {
    const char* bytes = static_cast<const char*>(data);
    std::vector<char> image(bytes, bytes + size);
    image.push_back('\0');  // PTX is text
    std::lock_guard<std::mutex> lock(mutex_);
    images_[capability] = std::move(image);
  }

  std::vector<char> find(int capability) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = images_.find(capability);
    if (found == images_.end()) {
      throw DriverError("no kernels were loaded for compute capability " +
                        std::to_string(capability / 10) + "." + std::to_string(capability % 10));
    }
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<char>> images_;
};

// A GPU with the kernels in it.
class Device {
 public:
  static const Device& get(int id) {
    static std::mutex& mutex = *new std::mutex;
    static auto& devices = *new std::map<int, Device>;
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = devices.find(id);
    return found != devices.end() ? found->second : devices.emplace(id, Device(id)).first->second;
  }

  int processors() const { return processors_; }

  // Memory of the device that holds zeros whenever a kernel begins on a stream: each leaves it so.
  // It is never freed; where more is wanted, at least twice as much is taken.
  unsigned* zeros(void* stream, size_t count) const {
    std::lock_guard<std::mutex> lock(*mutex_);
    Zeros& held = zeros_[stream];
    if (held.count < count) {
      const Driver& driver = Driver::get();
      const Current current(context_);
      const size_t wanted = std::max({count, 2 * held.count, size_t(16)});
      unsigned long long memory = 0;
      driver.require(driver.cuMemAlloc(&memory, wanted * sizeof(unsigned)), "cuMemAlloc");
      driver.require(driver.cuMemsetD8Async(memory, 0, wanted * sizeof(unsigned), stream),
                     "cuMemsetD8Async");
      held = {reinterpret_cast<unsigned*>(memory), wanted};
    }
    return held.memory;
  }

  // Launches blocks of `threads`, gx * gy of them, on a stream; `argument` is the kernel's.
  void launch(const std::string& kernel, unsigned gx, unsigned gy, unsigned threads, void* stream,
              const void* argument) const {
    const Driver& driver = Driver::get();
    const Current current(context_);
    void* function = nullptr;
    driver.require(driver.cuModuleGetFunction(&function, module_, kernel.c_str()), kernel.c_str());
    void* arguments[] = {const_cast<void*>(argument)};
    driver.require(driver.cuLaunchKernel(function, gx, gy, 1, threads, 1, 1, 0, stream, arguments,
                                         nullptr),
                   kernel.c_str());
  }

 private:
  explicit Device(int id) {
    const Driver& driver = Driver::get();
    const int kProcessors = 16, kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_*
    int device = 0;
    driver.require(driver.cuDeviceGet(&device, id), "cuDeviceGet");
    const auto attribute = [&](int which) {
      int value = 0;
      driver.require(driver.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
      return value;
    };
    processors_ = attribute(kProcessors);
    const std::vector<char> image = Images::get().find(10 * attribute(kMajor) + attribute(kMinor));
    driver.require(driver.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain");
    const Current current(context_);
    driver.require(driver.cuModuleLoadData(&module_, image.data()), "cuModuleLoadData");
  }

  struct Zeros {
    unsigned* memory = nullptr;
    size_t count = 0;
  };

  int processors_ = 0;
  void *context_ = nullptr, *module_ = nullptr;
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
  mutable std::map<void*, Zeros> zeros_;  // by stream
};

}  // namespace scratchbn_gpu
