// How the inside of the simulator says that a driver call fails: thrown, and returned at the border.
#pragma once

#include <cuda.h>

namespace simcuda {

struct DriverError {
  CUresult result;
};

}  // namespace simcuda
