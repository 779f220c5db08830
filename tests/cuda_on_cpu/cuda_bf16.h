// Stands in for the CUDA toolkit's header.
#include "cuda_on_cpu.h"
