#pragma once

#include <pybind11/pybind11.h>

namespace dcp_fast {

void bind_metadata(pybind11::module_& module);
void bind_metadata_stream(pybind11::module_& module);

}  // namespace dcp_fast
