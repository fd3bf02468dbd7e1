#pragma once

#include <string>
#include <vector>

// Seen by the Python module _C; everything else in the library is hidden.
#define GPT4FAST_EXPORT __attribute__((visibility("default")))

namespace gpt4fast {

// The instruction sets that CPU kernels are compiled for, lowest first. A level includes all those before it.
enum class CpuLevel { scalar, avx2, avx512, avx512_bf16 };

GPT4FAST_EXPORT const char* name_of(CpuLevel level);

// The features that the levels are made of and that both this processor and the operating system support.
GPT4FAST_EXPORT std::vector<std::string> cpu_features();

// The highest level that this processor supports.
GPT4FAST_EXPORT CpuLevel detected_cpu_level();

// The levels that this library has kernels for.
GPT4FAST_EXPORT std::vector<CpuLevel> compiled_cpu_levels();

// The level that kernels run at: the highest one both compiled and supported, or the one that GPT4FAST_CPU_LEVEL or
// force_cpu_level names. Throws std::invalid_argument where the variable's value is unknown, not compiled or not
// supported here.
GPT4FAST_EXPORT CpuLevel cpu_level();

// Throws std::invalid_argument like cpu_level(), and then leaves the level as it was.
GPT4FAST_EXPORT void force_cpu_level(const std::string& name);

}  // namespace gpt4fast

// Declares the kernel NAME, a TYPE, of every level, and active_NAME(), which gives that of the active level.
#if GPT4FAST_X86_LEVELS
#define GPT4FAST_KERNEL_OF_LEVELS(TYPE, NAME)                                                      \
  namespace scalar {                                                                               \
  extern const TYPE NAME;                                                                          \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  extern const TYPE NAME;                                                                          \
  }                                                                                                \
  namespace avx512 {                                                                               \
  extern const TYPE NAME;                                                                          \
  }                                                                                                \
  namespace avx512_bf16 {                                                                          \
  extern const TYPE NAME;                                                                          \
  }                                                                                                \
  inline const TYPE& active_##NAME() {                                                             \
    const TYPE* const kernels[] = {&scalar::NAME, &avx2::NAME, &avx512::NAME, &avx512_bf16::NAME}; \
    return *kernels[static_cast<int>(cpu_level())];                                                \
  }
#else
#define GPT4FAST_KERNEL_OF_LEVELS(TYPE, NAME) \
  namespace scalar {                          \
  extern const TYPE NAME;                     \
  }                                           \
  inline const TYPE& active_##NAME() {        \
    return scalar::NAME;                      \
  }
#endif
