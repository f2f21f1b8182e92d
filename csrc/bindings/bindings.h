// The parts of the module _native, which module.cpp puts together.
#pragma once

#include <pybind11/pybind11.h>

namespace dcp_fast {

void bind_cuda(pybind11::module_& module);
void bind_dequantize(pybind11::module_& module);
void bind_destinations(pybind11::module_& module);
void bind_elements(pybind11::module_& module);
void bind_exchange(pybind11::module_& module);
void bind_faults(pybind11::module_& module);
void bind_flatten(pybind11::module_& module);
void bind_metadata(pybind11::module_& module);
void bind_planning(pybind11::module_& module);
void bind_program(pybind11::module_& module);
void bind_trace(pybind11::module_& module);
void bind_transfer(pybind11::module_& module);

}  // namespace dcp_fast
