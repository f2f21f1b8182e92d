#include "cuda/slot.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "io/buffer.h"

namespace dcp_fast::cuda {

namespace {

// Boxes start at multiples of the largest vector's size.
constexpr uint32_t kAlignment = 16;
// What one block of 256 threads copies: 8 vectors of 16 bytes for each thread. A full slot keeps all multiprocessors
// busy, and descriptors are 0.1 % of what they describe.
constexpr uint32_t kEntryBytes = 32 << 10;

constexpr auto kPage = static_cast<uint32_t>(io::kPageBytes);

uint32_t round_up(uint32_t bytes, uint32_t to) { return (bytes + to - 1) / to * to; }
uint32_t aligned(uint32_t bytes) { return round_up(bytes, kAlignment); }

uint32_t entries_for(uint32_t bytes) { return (bytes + kEntryBytes - 1) / kEntryBytes; }

// The loops of a box that lies packed in the slot, outermost first. Neighbouring loops that are contiguous in the
// destination are joined. Empty if the whole box is contiguous there.
std::vector<BoxDim> collapse_packed(const box::Loops& loops) {
  std::vector<BoxDim> dims;  // innermost first
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    const auto size = static_cast<uint32_t>(loop->size);
    if (!dims.empty() && loop->destination_stride == dims.back().stride * dims.back().size) {
      dims.back().size *= size;
    } else {
      dims.push_back({size, 0, loop->destination_stride});
    }
  }
  if (dims.size() == 1) return {};
  std::reverse(dims.begin(), dims.end());
  return dims;
}

uint32_t widest_vector(DeviceAddress destination, const std::vector<BoxDim>& dims, uint32_t bytes) {
  uint64_t bits = destination | (dims.empty() ? bytes : dims.back().size) | kAlignment;
  for (size_t i = 0; i + 1 < dims.size(); ++i) bits |= static_cast<uint64_t>(dims[i].stride);
  return static_cast<uint32_t>(bits & (~bits + 1));  // the lowest bit that is set
}

// Joins copies that are neighbours both where they come from and in the destination.
template <typename Copy, typename Source>
void add_joined(std::vector<Copy>& copies, const Copy& copy, Source Copy::* source) {
  if (!copies.empty()) {
    Copy& last = copies.back();
    if (last.*source + last.bytes == copy.*source && last.destination + last.bytes == copy.destination) {
      last.bytes += copy.bytes;
      return;
    }
  }
  copies.push_back(copy);
}

}  // namespace

void SlotPlan::add_straight(const StraightCopy& copy) { add_joined(straight, copy, &StraightCopy::offset); }

void SlotPlan::take_from_device(const std::vector<DeviceAddress>& sources, const std::vector<uint32_t>& sizes) {
  const auto add = [](std::vector<DeviceCopy>& copies, const DeviceCopy& copy) {
    add_joined(copies, copy, &DeviceCopy::source);
  };
  // Both ascend: boxes that go straight lie behind all others, in the order of their copies.
  auto copy = straight.begin();
  for (size_t i = 0; i < offsets.size(); ++i) {
    if (offsets[i] < descriptors) {
      add(to_staging, {sources[i], offsets[i], sizes[i]});
      continue;
    }
    while (offsets[i] >= copy->offset + copy->bytes) ++copy;
    add(to_place, {sources[i], copy->destination + (offsets[i] - copy->offset), sizes[i]});
  }
  straight.clear();
}

void SlotPlan::write_descriptors(std::byte* slot) const {
  if (entries.empty()) return;
  if (!dims.empty()) std::memcpy(slot + descriptors, dims.data(), dims.size() * sizeof(BoxDim));
  std::memcpy(slot + entries_offset(), entries.data(), entries.size() * sizeof(BoxCopy));
}

bool SlotPacker::add(const box::Loops& loops, DeviceAddress destination, std::optional<int64_t> page_position) {
  Box box;
  box.destination = destination;
  box.bytes = static_cast<uint32_t>(box::volume(loops));
  box.dims = collapse_packed(loops);
  box.straight = box.dims.empty() && box.bytes >= kMinStraightBytes;
  box.vector_bytes = widest_vector(destination, box.dims, box.bytes);
  size_t size = aligned(box.bytes);
  if (page_position) {
    box.page_position = static_cast<uint32_t>(*page_position);
    size = kPage +
           round_up(*box.page_position + box.bytes, kPage);  // a part of the first page belongs to what comes before
  }
  if (!box.straight) size += box.dims.size() * sizeof(BoxDim) + entries_for(box.bytes) * sizeof(BoxCopy);
  if (used_ + size > capacity_) return false;
  used_ += size;
  boxes_.push_back(std::move(box));
  return true;
}

SlotPlan SlotPacker::finish() {
  SlotPlan plan;
  // A few small copies cost less than one more copy and a launch. Most slots of large tensors hold the small end of
  // one.
  const bool all_contiguous =
      std::all_of(boxes_.begin(), boxes_.end(), [](const Box& box) { return box.dims.empty(); });
  const auto small = std::count_if(boxes_.begin(), boxes_.end(), [](const Box& box) { return !box.straight; });
  if (all_contiguous && small <= kFewCopies) {
    for (Box& box : boxes_) box.straight = true;
  }
  plan.offsets.resize(boxes_.size());
  for (size_t i = 0; i < boxes_.size(); ++i) {
    if (boxes_[i].straight) continue;
    plan.offsets[i] = plan.bytes;
    plan.bytes += aligned(boxes_[i].bytes);
  }
  plan.descriptors = plan.bytes;
  for (size_t i = 0; i < boxes_.size(); ++i) {
    Box& box = boxes_[i];
    if (box.straight) continue;
    BoxCopy entry{};
    entry.destination = box.destination;
    entry.source = plan.offsets[i];
    entry.dims = plan.descriptors + static_cast<uint32_t>(plan.dims.size() * sizeof(BoxDim));
    entry.dim_count = static_cast<uint32_t>(box.dims.size());
    entry.vector_bytes = box.vector_bytes;
    if (!box.dims.empty()) {
      box.dims.back().size /= box.vector_bytes;
      box.dims.back().stride = box.vector_bytes;
      plan.dims.insert(plan.dims.end(), box.dims.begin(), box.dims.end());
    }
    const uint32_t vectors = box.bytes / box.vector_bytes;
    const uint32_t step = kEntryBytes / box.vector_bytes;
    for (entry.first = 0; entry.first < vectors; entry.first += step) {
      entry.count = std::min(step, vectors - entry.first);
      plan.entries.push_back(entry);
    }
  }
  plan.bytes = plan.entries_offset() + static_cast<uint32_t>(plan.entries.size() * sizeof(BoxCopy));
  plan.staged_bytes = plan.bytes;
  for (size_t i = 0; i < boxes_.size(); ++i) {
    const Box& box = boxes_[i];
    if (!box.straight) continue;
    plan.offsets[i] = box.page_position ? round_up(plan.bytes, kPage) + *box.page_position : plan.bytes;
    plan.add_straight({plan.offsets[i], box.bytes, box.destination});
    plan.bytes = round_up(plan.offsets[i] + box.bytes, box.page_position ? kPage : kAlignment);
  }
  boxes_.clear();
  used_ = 0;
  return plan;
}

}  // namespace dcp_fast::cuda
