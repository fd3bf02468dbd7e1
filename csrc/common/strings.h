#pragma once

#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "error_code.h"

namespace gpt4fast {

// The string that an operator was called with. A kernel takes the handle, because torch's own conversion to std::string
// never frees its copy: 32 bytes lost with every call (torch 2.10 to 2.13).
inline std::string take_string(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  std::string result(text, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return result;
}

}  // namespace gpt4fast
