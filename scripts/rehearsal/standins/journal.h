// The journal of a rehearsal: a line for each launch, copy and library call, fields parted by tabs:
//
//     kind  name  details  pointers  signature
//
// A pointer that the kernel only reads is written with a `c` before it. Nothing is written unless
// SCRATCHBN_REHEARSAL_JOURNAL names a file.
#pragma once
#include <cxxabi.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace rehearsal {

enum { NOT_SUPPORTED = 801 };  // of the CUDA runtime and of the driver

inline int journal() {
  static const int file = [] {
    const char* path = std::getenv("SCRATCHBN_REHEARSAL_JOURNAL");
    return path ? ::open(path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
  }();
  return file;
}

// One write for each line: the threads of the engine do not mix theirs.
inline void note(const std::string& line) {
  if (journal() < 0) return;
  const std::string whole = line + "\n";
  if (::write(journal(), whole.data(), whole.size()) < 0) std::perror("journal of the rehearsal");
}

inline std::string format(const char* pattern, ...) {
  char text[512];
  va_list values;
  va_start(values, pattern);
  std::vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

inline std::string pointer(const void* address, bool read_only) {
  return format(read_only ? "c%p" : "%p", address);
}

inline void note_call(const char* name) { note(std::string("CALL\t") + name); }

inline std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string found = text ? text : name;
  std::free(text);
  return found;
}

// The types of a function's parameters: what is in the last pair of brackets of its signature.
inline std::vector<std::string> parameters(const std::string& signature) {
  const size_t end = signature.rfind(')');
  if (end == std::string::npos) return {};
  size_t start = end + 1;
  for (int depth = 0; start-- > 0;) {
    const char c = signature[start];
    if (c == ')' || c == '>') ++depth;
    if (c == '(' || c == '<') --depth;
    if (depth == 0) break;
  }
  std::vector<std::string> types;
  std::string type;
  int depth = 0;
  for (const char c : signature.substr(start + 1, end - start - 1)) {
    if (c == '<' || c == '(') ++depth;
    if (c == '>' || c == ')') --depth;
    if (c == ',' && depth == 0) {
      types.push_back(type);
      type.clear();
    } else {
      type += c;
    }
  }
  if (!type.empty()) types.push_back(type);
  return types;
}

// The pointers among the arguments of a launch. Plans of mshadow hold theirs in their first words;
// the first plan is what is written to.
inline std::string pointers(const std::vector<std::string>& types, void** arguments) {
  std::string text;
  bool source = false;
  for (size_t i = 0; i < types.size(); ++i) {
    const std::string& type = types[i];
    if (!type.empty() && type.back() == '*') {
      text += " " + pointer(*static_cast<void**>(arguments[i]),
                            type.find("const") != std::string::npos);
    } else if (type.find("mshadow::expr::Plan") != std::string::npos) {
      for (int k = 0; k < 4; ++k) {
        text += " " + pointer(static_cast<void**>(arguments[i])[k], source || k > 0);
      }
      source = true;
    }
  }
  return text.empty() ? text : text.substr(1);
}

inline int capability() {
  const char* value = std::getenv("SCRATCHBN_REHEARSAL_CAPABILITY");
  return value ? std::atoi(value) : 80;
}

inline int devices() {
  const char* value = std::getenv("SCRATCHBN_REHEARSAL_DEVICES");
  return value ? std::atoi(value) : 1;
}

// Device memory is memory of the host, aligned as a card's is.
inline int allocate(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes / 256 + 1) * 256);
  if (*memory == nullptr) return 2;  // out of memory
  std::memset(*memory, 0, (bytes / 256 + 1) * 256);
  return 0;
}

inline void* handle() { return std::calloc(1, 64); }

}  // namespace rehearsal
