// The exchange between ranks for Python, which calls the collectives.

#include "exchange/exchange.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/column.h"
#include "bindings/file_options.h"
#include "bindings/python.h"
#include "bindings/quantized_rows.h"
#include "bindings/streams.h"
#include "cuda/pinned_ring.h"
#include "transfer/layouts.h"
#include "transfer/program.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using exchange::Exchange;
using exchange::LocalNeed;
using exchange::Need;
using exchange::RoundStats;
using transfer::Layouts;
using transfer::Program;

using Memory = std::pair<uint64_t, uint64_t>;  // address and size in bytes, of a tensor

std::vector<std::string> system_paths(const std::vector<py::str>& names) {
  std::vector<std::string> texts;
  texts.reserve(names.size());
  for (const py::str& name : names) texts.push_back(system_path(name));
  return texts;
}

std::vector<exchange::QuantizedElements> elements_of(const py::buffer& rows, size_t records) {
  Column column(rows);
  std::vector<exchange::QuantizedElements> result;
  while (!column.done()) {
    exchange::QuantizedElements elements;
    elements.record = column.next_index(records);
    elements.begin = column.next();
    elements.stored_row_bytes = column.next();
    elements.target.row_bytes = column.next();
    elements.target.unit_bytes = column.next();
    elements.target.unit_columns = column.next();
    const QuantizedRow row = next_row(column);
    elements.target.how = row.dequantization();
    elements.target.box = row.box;
    result.push_back(elements);
  }
  return result;
}

std::unique_ptr<Exchange> make_exchange(const std::vector<Memory>& encoded, std::vector<uint32_t> need_of_rank,
                                        std::vector<int64_t> node_of_rank, std::vector<int64_t> read_before,
                                        uint32_t rank, const LocalNeed* need, int64_t send_bytes,
                                        int64_t receive_bytes) {
  if (need_of_rank.size() != node_of_rank.size() || rank >= need_of_rank.size()) {
    throw py::value_error("each rank has a need and a node");
  }
  if (!read_before.empty() && read_before.size() != need_of_rank.size()) {
    throw py::value_error("each rank has read something before, or none has");
  }
  for (const uint32_t number : need_of_rank) {
    if (number >= encoded.size()) throw py::index_error("no such need");
  }
  if (send_bytes < 1 || receive_bytes < 1) throw py::value_error("a round needs memory");
  const py::gil_scoped_release release;
  std::vector<Need> needs;
  std::vector<int64_t> words;
  for (const auto& [address, size] : encoded) {
    words.resize(size / sizeof(int64_t));
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    if (!words.empty()) std::memcpy(words.data(), reinterpret_cast<void*>(address), words.size() * sizeof(int64_t));
    needs.push_back(Need::decode(words.data(), words.size()));
  }
  return std::make_unique<Exchange>(
      std::move(needs), exchange::Ranks{std::move(need_of_rank), std::move(node_of_rank), std::move(read_before)}, rank,
      need == nullptr ? std::vector<exchange::NeededFile>() : need->need.files(),
      exchange::RoundLimits{send_bytes, receive_bytes});
}

// A round and its memory.
using Part = std::tuple<uint32_t, uint64_t, uint64_t>;

// Ordinal, address and size.
using OnDevice = std::tuple<int, uint64_t, uint64_t>;

// `part`: of which the last two are the address and the size of memory that takes so many bytes.
template <typename AnyPart>
uint64_t address_of(const AnyPart& part, const std::vector<int64_t>& bytes) {
  const int64_t needed = std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
  if (static_cast<int64_t>(std::get<2>(part)) < needed) throw py::value_error("the memory of a round is too small");
  return std::get<1>(part);
}

std::byte* memory_of(const Part& part, const std::vector<int64_t>& bytes) {
  return reinterpret_cast<std::byte*>(address_of(part, bytes));  // NOLINT(performance-no-int-to-ptr)
}

RoundStats step(const Exchange& exchange, const LocalNeed& local, const Layouts& layouts,
                const std::optional<Part>& send, const std::optional<Part>& receive, const FileOptions& options,
                cuda::PinnedRing* ring, const StreamsByDevice& streams, const std::optional<OnDevice>& on_device) {
  for (const auto* part : {&send, &receive}) {
    if (*part && std::get<0>(**part) >= exchange.rounds()) throw py::index_error("no such round");
  }
  std::optional<exchange::Send> to_send;
  std::optional<exchange::Receive> to_place;
  if (send) {
    const uint32_t round = std::get<0>(*send);
    to_send = exchange::Send{round, memory_of(*send, exchange.bytes_to_send(round))};
  }
  transfer::CudaTargets targets{ring, stream_handles(streams)};
  if (receive) {
    const uint32_t round = std::get<0>(*receive);
    const std::vector<int64_t> bytes = exchange.bytes_to_receive(round);
    if (on_device) targets.received = {std::get<0>(*on_device), address_of(*on_device, bytes)};
    const bool is_on_device_alone = on_device && std::get<1>(*receive) == 0;
    to_place = exchange::Receive{round, is_on_device_alone ? nullptr : memory_of(*receive, bytes)};
  }
  return without_gil(
      [&] { return exchange::step(exchange, to_send, to_place, layouts, local, options, targets, interrupted); });
}

}  // namespace

void bind_exchange(py::module_& module) {
  py::class_<LocalNeed>(module, "Need", "What this rank needs of the files, and where it goes.")
      .def_static(
          "of_program",
          [](const Program& program, int32_t wave, const std::vector<py::str>& names) {
            const std::vector<std::string> texts = system_paths(names);
            return without_gil([&] { return exchange::need_of(program, wave, texts); });
          },
          py::arg("program"), py::arg("wave"), py::arg("names"), "The boxes of a wave that the engine places.")
      .def_static(
          "of_headers",
          [](const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
             const std::vector<py::str>& names, const FileOptions& options) {
            const std::vector<std::string> texts = system_paths(names);
            return without_gil([&] { return exchange::need_of_headers(layouts, records, most_bytes, texts, options); });
          },
          py::arg("layouts"), py::arg("records"), py::arg("most_bytes"), py::arg("names"), py::arg("options"),
          "The headers of all records, and some from beginning to end, as far as memory for them goes.")
      .def_static(
          "of_records",
          [](const Layouts& layouts, const std::vector<size_t>& records, const std::vector<py::str>& names) {
            const std::vector<std::string> texts = system_paths(names);
            return without_gil([&] { return exchange::need_of_records(layouts, records, texts); });
          },
          py::arg("layouts"), py::arg("records"), py::arg("names"), "Records from beginning to end.")
      .def_static(
          "of_quantized",
          [](const Layouts& layouts, const py::buffer& rows, const std::vector<py::str>& names) {
            const std::vector<std::string> texts = system_paths(names);
            const auto elements = elements_of(rows, layouts.records.size());
            return without_gil([&] { return exchange::need_of_quantized(layouts, elements, texts); });
          },
          py::arg("layouts"), py::arg("rows"), py::arg("names"),
          "Elements in rows that are dequantized as they arrive. A row of integers for each box: its record, where it "
          "begins there, bytes from row to row and in a row, bytes and elements of a unit (an element, or a block of "
          "MXFP4), and what _native.dequantize takes, but for where the elements lie.")
      .def_readonly("converted_items", &LocalNeed::converted_items)
      .def_readonly("bytes_left_out", &LocalNeed::bytes_left_out)
      .def_readonly("left_out", &LocalNeed::left_out)
      .def("is_on", &LocalNeed::is_on, py::arg("device"),
           "Whether all boxes are for one device, and none for the host.")
      .def("encode", [](const LocalNeed& local) {
        const std::vector<int64_t> words = local.need.encode();
        return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
      });

  module.def(
      "keep", [](Layouts& layouts, LocalNeed& need) { exchange::keep(layouts, need); }, py::arg("layouts"),
      py::arg("need"), "Has layouts take from memory what was received of headers and records.");
  module.def(
      "drop", [](Layouts& layouts, LocalNeed& need) { exchange::drop(layouts, need); }, py::arg("layouts"),
      py::arg("need"), "Lets go of that memory.");

  py::class_<RoundStats>(module, "RoundStats")
      .def_readonly("placed", &RoundStats::placed)
      .def_readonly("requests", &RoundStats::requests)
      .def_readonly("bytes_read", &RoundStats::bytes_read);

  py::class_<Exchange>(module, "Exchange")
      .def(py::init(&make_exchange), py::kw_only(), py::arg("needs"), py::arg("need_of_rank"), py::arg("node_of_rank"),
           py::arg("read_before") = std::vector<int64_t>(), py::arg("rank"), py::arg("need"), py::arg("send_bytes"),
           py::arg("receive_bytes"))
      .def_property_readonly("obstacle", &Exchange::obstacle)
      .def_property_readonly("rounds", &Exchange::rounds)
      .def_property_readonly("read_bytes", [](const Exchange& exchange) { return exchange.assignment().read_bytes(); })
      .def(
          "bytes_to_read",
          [](const Exchange& exchange, const transfer::Layouts& layouts, const FileOptions& options) {
            return without_gil([&] { return exchange.bytes_to_read(layouts, options); });
          },
          py::arg("layouts"), py::arg("options"),
          "How many bytes each rank would read, gaps included, if its files were those of the layouts.")
      .def("traffic",
           [](const Exchange& exchange) {
             const exchange::Traffic traffic = exchange.assignment().traffic();
             return py::make_tuple(traffic.sent, traffic.received, traffic.between_nodes);
           })
      .def("bytes_to_send", &Exchange::bytes_to_send, py::arg("round"))
      .def("bytes_to_receive", &Exchange::bytes_to_receive, py::arg("round"))
      .def("passes_on", &Exchange::passes_on, py::arg("round"),
           "Whether this rank sends other ranks what it receives in a round.")
      .def("step", &step, py::arg("need"), py::arg("layouts"), py::arg("send"), py::arg("receive"), py::arg("options"),
           py::arg("ring") = nullptr, py::arg("streams") = StreamsByDevice(), py::arg("on_device") = py::none(),
           "Reads what is sent in one round into memory, while what was received in another one is placed. Both are "
           "a round, and address and size of its memory; or None. `on_device`: ordinal, address and size of where the "
           "received round is too. The address of its memory may then be 0 if all boxes are for that device.");
}

}  // namespace dcp_fast
