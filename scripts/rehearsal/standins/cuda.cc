// libcuda.so.1, the driver: modules are kept for inspection, launches are noted down.
#include <atomic>
#include <set>

#include "call.h"
#include "journal.h"

using namespace rehearsal;

namespace {

// A kernel that a module holds, and the types of its parameters as far as they are known.
struct Function {
  std::string name, signature;
  std::vector<std::string> types;
};

struct Module {
  std::string image;
  bool binary;
};

template <typename T>
T at(const std::string& image, size_t offset) {
  T value{};
  if (offset + sizeof value <= image.size()) std::memcpy(&value, image.data() + offset, sizeof value);
  return value;
}

size_t size_of_elf(const char* image) {
  unsigned long long sections;
  unsigned short entry, count;
  std::memcpy(&sections, image + 0x28, 8);
  std::memcpy(&entry, image + 0x3a, 2);
  std::memcpy(&count, image + 0x3c, 2);
  size_t size = sections + size_t(entry) * count;
  unsigned long long programs;
  unsigned short program_entry, program_count;
  std::memcpy(&programs, image + 0x20, 8);
  std::memcpy(&program_entry, image + 0x36, 2);
  std::memcpy(&program_count, image + 0x38, 2);
  return std::max<size_t>(size, programs + size_t(program_entry) * program_count);
}

// The widths of a kernel's parameters in machine code: section .nv.info.<kernel>, whose entries of
// attribute 0x17 hold a parameter's ordinal, offset, and its size from bit 18 on.
std::map<int, unsigned> widths_in_elf(const std::string& image, const std::string& kernel) {
  std::map<int, unsigned> widths;
  const auto sections = at<unsigned long long>(image, 0x28);
  const auto entry = at<unsigned short>(image, 0x3a), count = at<unsigned short>(image, 0x3c);
  const auto names = at<unsigned long long>(
      image, sections + size_t(entry) * at<unsigned short>(image, 0x3e) + 0x18);
  for (int i = 0; i < count; ++i) {
    const size_t header = sections + size_t(entry) * i;
    const std::string name = image.c_str() + names + at<unsigned>(image, header);
    if (name != ".nv.info." + kernel) continue;
    size_t here = at<unsigned long long>(image, header + 0x18);
    const size_t end = here + at<unsigned long long>(image, header + 0x20);
    while (here + 4 <= end) {
      const auto form = at<unsigned char>(image, here), what = at<unsigned char>(image, here + 1);
      const auto size = at<unsigned short>(image, here + 2);
      if (form == 4 && what == 0x17) {
        widths[at<unsigned short>(image, here + 8)] = at<unsigned>(image, here + 12) >> 18;
      }
      here += 4 + (form == 4 ? size : 0);
    }
  }
  return widths;
}

// The same in PTX: what is declared in the brackets after the name of the entry.
std::map<int, unsigned> widths_in_ptx(const std::string& image, const std::string& kernel) {
  std::map<int, unsigned> widths;
  const size_t start = image.find(".entry " + kernel + "(");
  if (start == std::string::npos) return widths;
  const std::string text = image.substr(start, image.find(')', start) - start);
  int ordinal = 0;
  for (size_t i = text.find(".param"); i != std::string::npos; i = text.find(".param", i + 6)) {
    const std::string line = text.substr(i, text.find_first_of(",\n", i) - i);
    const bool wide = line.find("64 ") != std::string::npos && line.find('[') == std::string::npos;
    widths[ordinal++] = wide ? 8 : 4;
  }
  return widths;
}

std::string keep(const std::string& image, bool binary) {
  static std::atomic<int> count{0};
  const char* folder = std::getenv("SCRATCHBN_REHEARSAL_MODULES");
  if (folder == nullptr) return "";
  const std::string name =
      format("%d-%03d.%s", int(::getpid()), count++, binary ? "cubin" : "ptx");
  if (FILE* file = std::fopen((std::string(folder) + "/" + name).c_str(), "wb")) {
    std::fwrite(image.data(), 1, image.size(), file);
    std::fclose(file);
  }
  return name;
}

// The arrays that a kernel of batch_norm.cu touches: it is given one struct, and no pointers. Empty
// for any other kernel.
std::string pointers_of_ours(const std::string& kernel, const scratchbn_gpu::Call& k) {
  const auto is = [&](const char* name) { return kernel.rfind(std::string(name) + "_", 0) == 0; };
  std::vector<std::pair<const void*, bool>> found;  // and whether it is only read
  if (is("moments")) {
    found = {{k.kept, false}, {k.token, false}, {k.lines, false}, {k.partial, false},
             {k.arrived, false}, {k.x, true}, {k.running_mean, true}, {k.running_var, true},
             {k.flag, true}};
  } else if (is("transform")) {
    found = {{k.y, false}, {k.running_mean, false}, {k.running_var, false}, {k.num_batches, false},
             {k.x, true}, {k.kept, true}, {k.gamma, true}, {k.beta, true}, {k.flag, true}};
  } else if (is("gradient_sums")) {
    found = {{k.dgamma, false}, {k.dbeta, false}, {k.lines, false}, {k.partial, false},
             {k.arrived, false}, {k.x, true}, {k.dy, true}, {k.kept, true}, {k.gamma, true},
             {k.beta, true}};
  } else if (is("gradient")) {
    found = {{k.dx, false}, {k.x, true}, {k.dy, true}, {k.kept, true}, {k.lines, true},
             {k.gamma, true}, {k.beta, true}};
  }
  std::string text;
  for (const auto& one : found) {
    if (one.first) text += (text.empty() ? "" : " ") + pointer(one.first, one.second);
  }
  return text;
}

thread_local std::vector<void*> contexts;
void* primary() {
  static void* const context = handle();
  return context;
}

}  // namespace

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) { return *version = 12000, 0; }
API int cuDeviceGetCount(int* count) { return *count = devices(), 0; }
API int cuDeviceGet(int* device, int index) {
  if (index < 0 || index >= devices()) return 101;
  return *device = index, 0;
}
API int cuDeviceGetName(char* name, int length, int) {
  return std::snprintf(name, length, "rehearsal"), 0;
}
API int cuDeviceGetAttribute(int* value, int which, int) {
  switch (which) {
    case 1: case 2: case 3: *value = 1024; break;
    case 8: *value = 49152; break;
    case 10: *value = 32; break;
    case 16: *value = 108; break;
    case 39: *value = 2048; break;
    case 75: *value = capability() / 10; break;
    case 76: *value = capability() % 10; break;
    default: *value = 1;
  }
  return 0;
}
API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = primary(), 0; }
API int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
API int cuCtxGetCurrent(void** context) {
  return *context = contexts.empty() ? primary() : contexts.back(), 0;
}
API int cuCtxSetCurrent(void*) { return 0; }
API int cuCtxPushCurrent_v2(void* context) { return contexts.push_back(context), 0; }
API int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return 201;  // invalid context
  if (context) *context = contexts.back();
  return contexts.pop_back(), 0;
}
API int cuCtxGetDevice(int* device) { return *device = 0, 0; }
API int cuCtxSynchronize() { return 0; }
API int cuStreamSynchronize(void*) { return 0; }
API int cuStreamGetCtx(void*, void** context) { return *context = primary(), 0; }

API int cuModuleLoadData(void** module, const void* data) {
  const char* image = static_cast<const char*>(data);
  const bool binary = std::memcmp(image, "\177ELF", 4) == 0;
  auto* const loaded = new Module{{image, binary ? size_of_elf(image) : std::strlen(image)}, binary};
  const size_t target = binary ? std::string::npos : loaded->image.find(".target");
  const std::string text =
      target == std::string::npos
          ? "machine code"
          : loaded->image.substr(target, loaded->image.find('\n', target) - target);
  *module = loaded;
  note("MODULE\t" + keep(loaded->image, binary) + "\t" + text);
  return 0;
}
API int cuModuleLoadDataEx(void** module, const void* data, unsigned, void*, void*) {
  return cuModuleLoadData(module, data);
}
API int cuModuleUnload(void* module) { return delete static_cast<Module*>(module), 0; }
API int cuModuleGetFunction(void** function, void* module, const char* name) {
  const Module& loaded = *static_cast<Module*>(module);
  if (loaded.image.find(name) == std::string::npos) return 500;  // not found
  auto* const found = new Function{name, demangled(name), {}};
  if (found->signature != found->name) {
    found->types = parameters(found->signature);
  } else {
    const auto widths = loaded.binary ? widths_in_elf(loaded.image, name)
                                      : widths_in_ptx(loaded.image, name);
    for (const auto& width : widths) found->types.push_back(width.second == 8 ? "void*" : "");
  }
  return *function = found, 0;
}
API int cuFuncSetAttribute(void*, int, int) { return 0; }
API int cuFuncGetAttribute(int* value, int, void*) { return *value = 32, 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  return *blocks = 2, 0;
}

API int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                       unsigned by, unsigned bz, unsigned, void*, void** arguments, void**) {
  const Function& kernel = *static_cast<Function*>(function);
  const std::string size = format("grid=%ux%ux%u block=%ux%ux%u", gx, gy, gz, bx, by, bz);
  if (gx * gy * gz == 0 || bx * by * bz == 0) {
    note("REFUSED\t" + kernel.name + "\t" + size);
    return 1;  // invalid value: what a card says to an empty grid
  }
  std::string found = arguments ? pointers(kernel.types, arguments) : "";
  if (found.empty() && arguments && kernel.signature == kernel.name) {
    found = pointers_of_ours(kernel.name, *static_cast<scratchbn_gpu::Call*>(arguments[0]));
  }
  note("LAUNCH\t" + kernel.name + "\t" + size + "\t" + found + "\t" + kernel.signature);
  return 0;
}

API int cuMemAlloc_v2(unsigned long long* memory, size_t bytes) {
  void* taken = nullptr;
  const int status = allocate(&taken, bytes);
  return *memory = reinterpret_cast<unsigned long long>(taken), status;
}
API int cuMemsetD8Async(unsigned long long memory, unsigned char value, size_t count, void*) {
  note("SET\tmemset\tbytes=" + std::to_string(count) + "\t" +
       pointer(reinterpret_cast<void*>(memory), false));
  std::memset(reinterpret_cast<void*>(memory), value, count);
  return 0;
}
API int cuMemsetD32Async(unsigned long long memory, unsigned value, size_t count, void*) {
  note("SET\tmemset\tbytes=" + std::to_string(4 * count) + "\t" +
       pointer(reinterpret_cast<void*>(memory), false));
  for (size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(memory)[i] = value;
  return 0;
}
API int cuGetErrorString(int, const char** text) {
  return *text = "an error of the rehearsal's stand-ins", 0;
}
API int cuGetErrorName(int, const char** text) { return *text = "REHEARSAL", 0; }
