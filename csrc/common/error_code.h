#pragma once

#include <torch/csrc/stable/macros.h>

// Throws where a call of torch's C interface failed.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
