// Stands in for torch's header.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(call)                                           \
  do {                                                                 \
    const int error = (call);                                          \
    TORCH_CHECK(error == 0, #call, " failed with CUDA error ", error); \
  } while (0)
