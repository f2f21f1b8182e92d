#include "transfer/program.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"
#include "transfer/waves.h"

namespace dcp_fast::transfer {

namespace {

using checkpoint::ParsedRecord;

std::string text(const std::vector<int64_t>& values) {
  std::string result = "[";
  for (size_t i = 0; i < values.size(); ++i) result += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return result + "]";
}

// narrow_tensor_by_index (torch/distributed/_shard/_utils.py): a dimension is narrowed only if the length is smaller
// than it. Returns the sizes after narrowing and corrects `offsets`; throws Error(kSizeMismatch) where torch raises.
std::vector<int64_t> narrow(const char* what, const std::vector<int64_t>& sizes, std::vector<int64_t>& offsets,
                            const std::vector<int64_t>& lengths) {
  if (lengths.size() > sizes.size()) {
    throw Error(ErrorKind::kSizeMismatch,
                "a box of " + std::to_string(lengths.size()) + " dimensions in " + what + " of sizes " + text(sizes));
  }
  std::vector<int64_t> narrowed = sizes;
  for (size_t dim = 0; dim < lengths.size(); ++dim) {
    if (lengths[dim] >= sizes[dim]) {
      offsets[dim] = 0;
      continue;
    }
    if (lengths[dim] < 0 || offsets[dim] < 0 || offsets[dim] > sizes[dim] - lengths[dim]) {
      throw Error(ErrorKind::kSizeMismatch, "the box at " + text(offsets) + " of lengths " + text(lengths) +
                                                " exceeds " + what + " of sizes " + text(sizes));
    }
    narrowed[dim] = lengths[dim];
  }
  offsets.resize(sizes.size(), 0);
  return narrowed;
}

// torch narrows no tensor of a safetensors file that is smaller than the box.
void require_within(const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets,
                    const std::vector<int64_t>& lengths) {
  for (size_t dim = 0; dim < std::min(lengths.size(), sizes.size()); ++dim) {
    if (lengths[dim] < 0 || offsets[dim] < 0 || offsets[dim] > sizes[dim] || lengths[dim] > sizes[dim] - offsets[dim]) {
      throw Error(ErrorKind::kSizeMismatch, "the box at " + text(offsets) + " of lengths " + text(lengths) +
                                                " exceeds the stored tensor of sizes " + text(sizes));
    }
  }
}

int64_t element_offset(const std::vector<int64_t>& offsets, const std::vector<int64_t>& strides) {
  return std::inner_product(offsets.begin(), offsets.end(), strides.begin(), int64_t{0});
}

// Whether two elements of the destination may share memory. torch decides what copying to such a tensor means.
bool overlaps_itself(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return !box::source_is_disjoint(box::collapse(sizes, strides, strides, 1));
}

// Whether the innermost loop of torch's copy_ finds elements side by side. torch's loops are in the order of the
// destination; a tensor of no dimensions is copied in a way of its own.
bool is_inner_contiguous(const std::vector<int64_t>& sizes, const std::vector<int64_t>& source_strides,
                         const std::vector<int64_t>& destination_strides) {
  std::optional<size_t> inner;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] > 1 && (!inner || destination_strides[dim] < destination_strides[*inner])) inner = dim;
  }
  if (!inner) return !sizes.empty();
  return source_strides[*inner] == 1 && destination_strides[*inner] == 1;
}

}  // namespace

Program::Program(const Layouts& layouts, std::vector<Item> items, const std::vector<Destination>& destinations)
    : layouts_(layouts), items_(std::move(items)), transfers_(items_.size()) {
  for (size_t i = 0; i < items_.size(); ++i) {
    try {
      prepare(i, destinations.at(items_[i].destination));
    } catch (Error& error) {
      layouts_.attribute(error, items_[i].record);
      error.item = static_cast<int64_t>(i);
      throw;
    }
  }

  // Different boxes of such a destination may share bytes, which only their addresses tell.
  std::vector<bool> overlapping;
  overlapping.reserve(destinations.size());
  for (const Destination& destination : destinations) {
    overlapping.push_back(overlaps_itself(destination.sizes, destination.strides));
  }

  std::vector<size_t> order(items_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [this](size_t a, size_t b) {
    return layouts_.records[items_[a].record].file < layouts_.records[items_[b].record].file;
  });
  std::vector<Write> writes;
  writes.reserve(order.size());
  for (const size_t i : order) {
    const Item& item = items_[i];
    const Destination& destination = destinations[item.destination];
    Write write;
    if (std::find(item.lengths.begin(), item.lengths.end(), 0) == item.lengths.end() && destination.data != nullptr) {
      const bool known = destination.dtype != checkpoint::kUnknownDType;
      const int64_t itemsize = known ? checkpoint::info(destination.dtype).itemsize : destination.itemsize;
      write.begin = reinterpret_cast<uint64_t>(destination.data) +
                    static_cast<uint64_t>(element_offset(item.destination_offsets, destination.strides) * itemsize);
      int64_t last = 0;
      for (size_t dim = 0; dim < item.lengths.size(); ++dim) last += (item.lengths[dim] - 1) * destination.strides[dim];
      write.end = write.begin + static_cast<uint64_t>((last + 1) * itemsize);
    }
    write.destination = overlapping[item.destination] ? destinations.size() + i : item.destination;
    write.offsets = item.destination_offsets.data();
    write.sizes = item.lengths.data();
    write.dims = item.lengths.size();
    writes.push_back(write);
  }
  const std::vector<int32_t> waves = assign_waves(writes);
  items_by_wave_.resize(1);
  for (size_t i = 0; i < order.size(); ++i) {
    transfers_[order[i]].wave = waves[i];
    const auto wave = static_cast<size_t>(waves[i]);
    if (wave >= items_by_wave_.size()) items_by_wave_.resize(wave + 1);
    items_by_wave_[wave].push_back(order[i]);
  }
}

void Program::cut(std::vector<std::vector<size_t>> waves) {
  if (this->waves() != 1) throw std::invalid_argument("boxes of the program share memory");
  std::vector<bool> is_given(items_.size(), false);
  size_t given = 0;
  for (const std::vector<size_t>& wave : waves) {
    for (const size_t i : wave) {
      if (i >= items_.size() || is_given[i]) throw std::invalid_argument("an item is not there, or is given twice");
      is_given[i] = true;
      ++given;
    }
  }
  if (given != items_.size()) throw std::invalid_argument("an item is missing");
  items_by_wave_ = std::move(waves);
  for (size_t wave = 0; wave < items_by_wave_.size(); ++wave) {
    for (const size_t i : items_by_wave_[wave]) transfers_[i].wave = static_cast<int32_t>(wave);
  }
}

int64_t Program::bytes_of(size_t index) const {
  const Item& item = items_[index];
  const int64_t itemsize = checkpoint::info(layouts_.parsed[item.record].layout.dtype).itemsize;
  return std::accumulate(item.lengths.begin(), item.lengths.end(), itemsize, std::multiplies<>());
}

int64_t Program::bytes_needed(int32_t wave) const {
  int64_t bytes = 0;
  for (const size_t i : items_in_wave(wave)) {
    if (transfers_[i].kind != Transfer::Kind::kFallback) bytes += bytes_of(i);
  }
  return bytes;
}

void Program::prepare(size_t index, const Destination& destination) {
  Item& item = items_[index];
  Transfer& transfer = transfers_[index];
  const ParsedRecord& parsed = layouts_.parsed.at(item.record);
  const std::vector<int64_t> lengths = item.lengths;
  item.lengths = narrow("the destination", destination.sizes, item.destination_offsets, lengths);
  if (parsed.status != ParsedRecord::Status::kTensor) {
    transfer.kind = Transfer::Kind::kFallback;
    return;
  }
  const checkpoint::TensorLayout& layout = parsed.layout;
  if (layouts_.are_payloads) require_within(layout.sizes, item.storage_offsets, lengths);
  const std::vector<int64_t> source_lengths = narrow("the stored tensor", layout.sizes, item.storage_offsets, lengths);
  if (source_lengths != item.lengths) {
    throw Error(ErrorKind::kSizeMismatch, "mismatch sizes " + text(item.lengths) + " of the destination vs " +
                                              text(source_lengths) + " of the stored tensor");
  }
  const int64_t itemsize = checkpoint::info(layout.dtype).itemsize;
  if (!box::source_is_disjoint(box::collapse(item.lengths, layout.strides, layout.strides, itemsize))) {
    transfer.kind = Transfer::Kind::kFallback;  // an expanded tensor: torch knows how to read it
    return;
  }
  bytes_needed_ += bytes_of(index);
  const bool same_dtype = destination.dtype == layout.dtype;
  constexpr checkpoint::DType kBool = checkpoint::dtype_by_name("bool");
  if ((!same_dtype || layout.dtype == kBool) && destination.device == kHost) {
    const bool inner_contiguous = is_inner_contiguous(item.lengths, layout.strides, destination.strides);
    transfer.conversion = copy::find_conversion(layout.dtype, destination.dtype, inner_contiguous);
  }
  if (destination.device == kElsewhere || !(same_dtype || transfer.conversion) ||
      overlaps_itself(item.lengths, destination.strides)) {
    transfer.kind = Transfer::Kind::kConverted;
    return;
  }
  const int64_t destination_itemsize = checkpoint::info(destination.dtype).itemsize;
  box::Loops loops = transfer.conversion ? box::collapse_elements(item.lengths, layout.strides, destination.strides,
                                                                  itemsize, destination_itemsize)
                                         : box::collapse(item.lengths, layout.strides, destination.strides, itemsize);
  if (loops.empty()) return;
  transfer.source = layouts_.records[item.record].offset + layout.begin +
                    element_offset(item.storage_offsets, layout.strides) * itemsize;
  transfer.device = destination.device;
  transfer.destination =
      destination.data + element_offset(item.destination_offsets, destination.strides) * destination_itemsize;
  transfer.loops = std::move(loops);
}

}  // namespace dcp_fast::transfer
