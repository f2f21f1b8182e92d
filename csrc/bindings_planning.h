#pragma once

#include <pybind11/pybind11.h>

namespace dcp_fast {

void bind_planning(pybind11::module_& module);

}  // namespace dcp_fast
