#include "cpu_level.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gpt4fast {
namespace {

constexpr CpuLevel kLevels[] = {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512, CpuLevel::avx512_bf16};

struct Features {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512dq = false, avx512bw = false, avx512vl = false, avx512_bf16 = false;
};

Features read_features() {
  Features found;
#if defined(__x86_64__)
  const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1u) != 0; };
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !bit(ecx, 27)) {
    return found;  // no OSXSAVE: the operating system keeps no vector registers
  }
  const bool fma = bit(ecx, 12), f16c = bit(ecx, 29), avx = bit(ecx, 28);
  // A feature only counts where the operating system saves its registers: XMM and YMM (bits 1, 2), ZMM (5, 6, 7).
  uint32_t saved = 0, saved_high = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
  const bool ymm = avx && (saved & 0x06u) == 0x06u;
  const bool zmm = ymm && (saved & 0xe0u) == 0xe0u;
  found.fma = ymm && fma;
  found.f16c = ymm && f16c;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    const uint32_t last_subleaf = eax;
    found.avx2 = ymm && bit(ebx, 5);
    found.avx512f = zmm && bit(ebx, 16);
    found.avx512dq = zmm && bit(ebx, 17);
    found.avx512bw = zmm && bit(ebx, 30);
    found.avx512vl = zmm && bit(ebx, 31);
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
      found.avx512_bf16 = zmm && bit(eax, 5);
    }
  }
#endif
  return found;
}

const Features& features() {
  static const Features found = read_features();
  return found;
}

CpuLevel best_level() {
  CpuLevel best = CpuLevel::scalar;
  for (const CpuLevel level : compiled_cpu_levels()) {
    best = level <= detected_cpu_level() && level > best ? level : best;
  }
  return best;
}

CpuLevel checked_level(const std::string& name, const char* source) {
  std::string usable;
  for (const CpuLevel level : compiled_cpu_levels()) {
    if (level <= detected_cpu_level()) {
      if (name == name_of(level)) {
        return level;
      }
      usable += (usable.empty() ? "" : ", ") + std::string(name_of(level));
    }
  }
  std::string reason = "is not a CPU level";
  for (const CpuLevel level : kLevels) {
    if (name == name_of(level)) {
      reason = level > detected_cpu_level() ? "is not supported by this processor (its level is " +
                                                  std::string(name_of(detected_cpu_level())) + ")"
                                            : "has no kernels in this build";
    }
  }
  throw std::invalid_argument(std::string(source) + ": '" + name + "' " + reason + "; expected one of: " + usable);
}

// Chosen at the first call and not in a static initialiser, because an exception there would end the process.
std::atomic<CpuLevel>& active_level() {
  static std::atomic<CpuLevel> level = [] {
    const char* forced = std::getenv("GPT4FAST_CPU_LEVEL");
    return forced && *forced ? checked_level(forced, "GPT4FAST_CPU_LEVEL") : best_level();
  }();
  return level;
}

}  // namespace

const char* name_of(CpuLevel level) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(level)];
}

std::vector<std::string> cpu_features() {
  const Features& found = features();
  std::vector<std::string> names;
  const auto add = [&](bool present, const char* name) {
    if (present) {
      names.emplace_back(name);
    }
  };
  add(found.avx2, "avx2");
  add(found.fma, "fma");
  add(found.f16c, "f16c");
  add(found.avx512f, "avx512f");
  add(found.avx512dq, "avx512dq");
  add(found.avx512bw, "avx512bw");
  add(found.avx512vl, "avx512vl");
  add(found.avx512_bf16, "avx512_bf16");
  return names;
}

CpuLevel detected_cpu_level() {
  const Features& found = features();
  const bool avx2 = found.avx2 && found.fma && found.f16c;
  const bool avx512 = avx2 && found.avx512f && found.avx512dq && found.avx512bw && found.avx512vl;
  return avx512 && found.avx512_bf16 ? CpuLevel::avx512_bf16
         : avx512                    ? CpuLevel::avx512
         : avx2                      ? CpuLevel::avx2
                                     : CpuLevel::scalar;
}

std::vector<CpuLevel> compiled_cpu_levels() {
#if GPT4FAST_X86_LEVELS
  return {std::begin(kLevels), std::end(kLevels)};
#else
  return {CpuLevel::scalar};
#endif
}

CpuLevel cpu_level() {
  return active_level().load(std::memory_order_relaxed);
}

void force_cpu_level(const std::string& name) {
  const CpuLevel level = checked_level(name, "force_cpu_level");
  active_level().store(level, std::memory_order_relaxed);
}

}  // namespace gpt4fast
