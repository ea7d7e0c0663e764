// Types and intrinsics that all kernels use; tests that run them on a CPU bring intrinsics of their own.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef ON_CPU
#include "gpu_intrinsics.h"
#endif
