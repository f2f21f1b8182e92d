// The names of results, as cuGetErrorName and cuGetErrorString give them.
#pragma once

#include <cuda.h>

namespace simcuda {

// Null and CUDA_ERROR_INVALID_VALUE for a number that is no result.
CUresult error_name(CUresult error, const char** name);
CUresult error_text(CUresult error, const char** text);

}  // namespace simcuda
