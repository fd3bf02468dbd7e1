// What g++ calls before every access of code that is compiled with
//   -fsanitize=kernel-address --param asan-instrumentation-with-call-threshold=0 --param asan-stack=0
//   --param asan-globals=0
// decides whether a kernel may do that. Not compiled so itself.
#include <cstring>
#include <sstream>
#include <vector>

#include <dlfcn.h>
#include <link.h>

#include "emulator.h"

namespace gpt4fast::emulation {
namespace {

constexpr size_t kAlignment = 1024;  // of shared memory
constexpr unsigned kNobody = ~0u, kWholeWarp = 1u << 20, kWholeBlock = 1u << 21;

// An access, or several of the same step: then who did them is one of the warp (kWholeWarp + its number), or anyone.
struct Access {
  unsigned who = kNobody;
  uint32_t block_step = 0, warp_step = 0;

  // Whether it came before what the thread does now: it did it itself, or there was a barrier since.
  bool is_before(const Thread& thread) const {
    if (who == kNobody || who == thread.index || block_step < thread.block_step) {
      return true;
    }
    const bool same_warp = who >= kWholeWarp ? who == kWholeWarp + thread.warp : who / kWarpSize == thread.warp;
    return same_warp && warp_step < thread.warp_step;
  }

  void add(const Thread& thread) {
    const bool same_warp = who >= kWholeWarp ? who == kWholeWarp + thread.warp : who / kWarpSize == thread.warp;
    who = is_before(thread) ? thread.index : same_warp ? kWholeWarp + thread.warp : kWholeBlock;
    block_step = thread.block_step;
    warp_step = thread.warp_step;
  }
};

struct SharedByte {
  enum : uint8_t { unwritten, reserved, written } state = unwritten;
  Access write, read;
  uint32_t publications = 0;  // of the thread that wrote it, before
};

struct Range {
  uintptr_t begin, end;
  bool is_writable;
};

std::vector<char> shared_bytes;
std::vector<SharedByte> shadow;
uintptr_t shared_begin = 0, shared_end = 0;
std::vector<Range> ranges;

[[noreturn]] void refuse(const char* what, uintptr_t address, size_t bytes) {
  std::ostringstream text;
  text << what << ": " << bytes << " bytes at ";
  if (shared_begin <= address && address < shared_end) {
    text << "byte " << address - shared_begin << " of shared memory";
  } else {
    text << std::hex << "0x" << address;
    for (const Range& range : ranges) {
      const auto from = static_cast<intptr_t>(address - range.begin);
      if (-4096 < from && address < range.end + 4096) {
        text << std::dec << ", byte " << from << " of a tensor of " << range.end - range.begin;
      }
    }
  }
  fault(text.str());
}

void check_shared(uintptr_t address, size_t bytes, bool is_write, const Thread& thread) {
  if (address + bytes > shared_end) {
    refuse("leaves shared memory", address, bytes);
  }
  for (size_t i = address - shared_begin; i < address - shared_begin + bytes; ++i) {
    SharedByte& byte = shadow[i];
    if (byte.state == SharedByte::reserved) {
      refuse("does not wait for cp.async", address, bytes);
    }
    if (!byte.write.is_before(thread)) {
      refuse("needs a barrier after another thread's write", address, bytes);
    }
    if (!is_write) {
      if (byte.state == SharedByte::unwritten) {
        refuse("reads what was not written", address, bytes);
      }
      byte.read.add(thread);
      continue;
    }
    if (!byte.read.is_before(thread)) {
      refuse("needs a barrier after another thread's read", address, bytes);
    }
    byte.state = SharedByte::written;
    byte.write = {};
    byte.write.add(thread);
    byte.publications = thread.publications;
  }
}

// Constants and the variables of emulator.cpp.
bool is_in_this_library(uintptr_t address) {
  static const Range library = [] {
    Dl_info info;
    link_map* map = nullptr;
    dladdr1(reinterpret_cast<void*>(&allow_access), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP);
    Range found{reinterpret_cast<uintptr_t>(info.dli_fbase), 0, true};
    const auto* header = static_cast<const ElfW(Ehdr)*>(info.dli_fbase);
    const auto* segment = reinterpret_cast<const ElfW(Phdr)*>(found.begin + header->e_phoff);
    for (unsigned i = 0; i < header->e_phnum; ++i) {
      if (segment[i].p_type == PT_LOAD) {
        found.end = std::max<uintptr_t>(found.end, found.begin + segment[i].p_vaddr + segment[i].p_memsz);
      }
    }
    return found;
  }();
  return library.begin <= address && address < library.end;
}

void check(uintptr_t address, size_t bytes, bool is_write) {
  const Thread* thread = running_thread();
  if (!thread || bytes == 0 || is_on_a_stack(address)) {
    return;
  }
  const bool is_shared = shared_begin <= address && address < shared_end;
  if (!is_shared && is_in_this_library(address)) {
    return;
  }
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes) {
    refuse("needs an aligned address", address, bytes);
  }
  if (is_shared) {
    check_shared(address, bytes, is_write, *thread);
    return;
  }
  bool is_readable = false;
  for (const Range& range : ranges) {
    if (range.begin <= address && address + bytes <= range.end) {
      is_readable = true;
      if (range.is_writable || !is_write) {
        return;
      }
    }
  }
  refuse(is_readable ? "writes to a tensor that is only read" : "leaves its tensors", address, bytes);
}

}  // namespace

void allow_access(const void* data, size_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  ranges.push_back({begin, begin + bytes, writable});
}

void forget_accesses() {
  ranges.clear();
}

void* begin_shared_memory(size_t bytes) {
  shared_bytes.assign(bytes + kAlignment, static_cast<char>(0xFF));  // NaN, in every type
  shadow.assign(bytes, {});
  shared_begin = (reinterpret_cast<uintptr_t>(shared_bytes.data()) + kAlignment - 1) / kAlignment * kAlignment;
  shared_end = shared_begin + bytes;
  return reinterpret_cast<void*>(shared_begin);
}

void reserve(uintptr_t address, size_t bytes) {
  check(address, bytes, true);
  if (address < shared_begin || address >= shared_end) {
    refuse("copies to what is not shared memory", address, bytes);
  }
  for (size_t i = 0; i < bytes; ++i) {
    shadow[address - shared_begin + i].state = SharedByte::reserved;
  }
}

void arrive(uintptr_t address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    SharedByte& byte = shadow[address - shared_begin + i];
    byte.state = SharedByte::written;
    byte.write = {};
    byte.write.add(*running_thread());
    byte.publications = running_thread()->publications;
  }
}

void check_unordered_read(const void* data, size_t bytes) {
  check_read(data, bytes);
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (address < shared_begin || address >= shared_end) {
    refuse("multiplies what is not shared memory", address, bytes);
  }
  for (size_t i = 0; i < bytes; ++i) {
    const SharedByte& byte = shadow[address - shared_begin + i];
    if (thread_number(byte.write.who).publications <= byte.publications) {
      refuse("multiplies what was not published", address, bytes);
    }
  }
}

void check_read(const void* data, size_t bytes) {
  check(reinterpret_cast<uintptr_t>(data), bytes, false);
}

void check_write(const void* data, size_t bytes) {
  check(reinterpret_cast<uintptr_t>(data), bytes, true);
}

}  // namespace gpt4fast::emulation

using gpt4fast::emulation::check_read;
using gpt4fast::emulation::check_write;

#define GPT4FAST_CHECKS(BYTES)                           \
  void __asan_load##BYTES##_noabort(const void* data) {  \
    check_read(data, BYTES);                             \
  }                                                      \
  void __asan_store##BYTES##_noabort(const void* data) { \
    check_write(data, BYTES);                            \
  }

extern "C" {
GPT4FAST_CHECKS(1)
GPT4FAST_CHECKS(2)
GPT4FAST_CHECKS(4)
GPT4FAST_CHECKS(8)
GPT4FAST_CHECKS(16)
void __asan_loadN_noabort(const void* data, size_t bytes) {
  check_read(data, bytes);
}
void __asan_storeN_noabort(const void* data, size_t bytes) {
  check_write(data, bytes);
}
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(const void*) {}
void __asan_after_dynamic_init() {}
}
