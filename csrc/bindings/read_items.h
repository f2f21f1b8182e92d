// ReadItems, made from columns.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <vector>

#include "metadata/columns.h"
#include "planning/boxes.h"

namespace dcp_fast {

// torch's classes, and its LoadItemType.TENSOR.
struct ReadItemTypes {
  pybind11::type read_item;
  pybind11::type metadata_index;
  pybind11::type size;
  pybind11::object tensor;
};

// The items of some boxes. `fqns` and `wanted` are of all requests, as in Requests. Throws std::out_of_range.
pybind11::list make_read_items(const metadata::Columns& columns, const planning::Boxes& boxes,
                               const std::vector<size_t>& indices, const pybind11::list& fqns,
                               const pybind11::list& wanted, const ReadItemTypes& types);

}  // namespace dcp_fast
