#pragma once

// Functions that nvcc compiles for host and device, and other compilers for the host.
#if defined(__CUDACC__)
#define GPT4FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GPT4FAST_HOST_DEVICE inline
#endif
