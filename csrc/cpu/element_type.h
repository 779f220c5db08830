// The element types that CPU kernels serve: a table of kernels holds one entry for each, in this order.
#pragma once

enum ElementType { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, ELEMENT_TYPES };
