// Destinations: tensors of Python as rows for the transfer program, and what hooks of planners do to them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/placed_boxes.h"
#include "bindings/plain_tensors.h"

namespace py = pybind11;

namespace dcp_fast {

void bind_destinations(py::module_& module) {
  py::class_<PlainTensors>(module, "PlainTensors")
      .def(py::init<py::tuple, py::object, py::list>(), py::arg("types"), py::arg("api"), py::arg("samples"))
      .def("rows", &PlainTensors::rows, py::arg("tensors"), py::arg("other"));
  py::class_<PlacedBoxes>(module, "PlacedBoxes")
      .def(py::init<PlainTensors, py::list, py::list, std::vector<size_t>, py::list, py::object, py::tuple>(),
           py::arg("plain"), py::arg("fqns"), py::arg("values"), py::arg("numbers"), py::arg("tensors"),
           py::arg("dtensor"), py::arg("overrides"))
      .def("others", &PlacedBoxes::others)
      .def("are_as_resolved", &PlacedBoxes::are_as_resolved, py::arg("state_dict"), py::arg("boxes"), py::arg("look"))
      .def("keep_versions", &PlacedBoxes::keep_versions, py::arg("boxes"))
      .def("is_as_placed", &PlacedBoxes::is_as_placed, py::arg("state_dict"), py::arg("box"), py::arg("look"));
}

}  // namespace dcp_fast
