#pragma once

namespace gpt4fast {

// What the elements of a tensor are, for code that knows nothing of torch.
enum class ElementType { float32, bfloat16, float16, int8, float8_e4m3fn };

}  // namespace gpt4fast
