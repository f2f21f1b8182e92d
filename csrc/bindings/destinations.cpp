// Destinations: tensors of Python as rows for the transfer program, and what hooks of planners do to them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/placed_boxes.h"
#include "bindings/plain_tensors.h"
#include "bindings/tensor_types.h"

namespace py = pybind11;

namespace dcp_fast {

void bind_destinations(py::module_& module) {
  py::class_<TensorTypes>(module, "TensorTypes")
      .def(py::init<py::object, py::tuple, py::tuple>(), py::arg("dtensor"), py::arg("whole"), py::arg("overrides"))
      .def("is_whole", [](const TensorTypes& types, py::handle value) { return types.is_whole(value.ptr()); })
      .def("plain_local_tensor", [](const TensorTypes& types, py::handle value) {
        py::object local = types.local_of(value.ptr());
        return local ? std::move(local) : py::none();
      });
  py::class_<PlainTensors>(module, "PlainTensors")
      .def(py::init<py::tuple, py::object, py::dict>(), py::arg("types"), py::arg("api"), py::arg("dtypes"))
      .def("rows", &PlainTensors::rows, py::arg("tensors"), py::arg("other"));
  py::class_<PlacedBoxes>(module, "PlacedBoxes")
      .def(py::init<PlainTensors, py::list, py::list, std::vector<size_t>, py::list, TensorTypes>(), py::arg("plain"),
           py::arg("fqns"), py::arg("values"), py::arg("numbers"), py::arg("tensors"), py::arg("types"))
      .def("others", &PlacedBoxes::others)
      .def("are_as_resolved", &PlacedBoxes::are_as_resolved, py::arg("state_dict"), py::arg("boxes"), py::arg("look"))
      .def("keep_versions", &PlacedBoxes::keep_versions, py::arg("boxes"))
      .def("commit", &PlacedBoxes::commit, py::arg("planner"), py::arg("window"), py::arg("items"), py::arg("look"),
           py::arg("other"), py::arg("load_bytes"), py::arg("has_changed"));
}

}  // namespace dcp_fast
