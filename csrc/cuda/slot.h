// What one slot carries. A slot is a piece of pinned memory, and as much staging memory on the device. The boxes of a
// slot are packed one after another when it is filled: slicing on the source side is done by then. A box that is
// contiguous in its destination too, and large, is copied straight there. All others travel together, followed by
// descriptors of where they go, to the staging memory of the device, and one kernel launch places them from there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "box/box.h"
#include "cuda/box_copy.h"
#include "cuda/driver_abi.h"

namespace dcp_fast::cuda {

// A box of at least this size gets a copy of its own: a copy takes about 5 us to start, which is less than the kernel
// needs to read and write so many bytes.
constexpr int64_t kMinStraightBytes = 64 << 10;

// Up to so many smaller boxes get copies of their own too, if nothing else in the slot needs the kernel.
constexpr int kFewCopies = 4;

struct StraightCopy {
  uint32_t offset = 0;  // in the slot
  uint32_t bytes = 0;
  DeviceAddress destination = 0;
};

// Bytes that are on the device already.
struct DeviceCopy {
  DeviceAddress source = 0;
  DeviceAddress destination = 0;  // for staging memory, from the beginning of the slot's
  uint32_t bytes = 0;
};

struct SlotPlan {
  std::vector<uint32_t> offsets;  // where in the slot each box lies, in the order in which they were added
  std::vector<StraightCopy> straight;
  uint32_t staged_bytes = 0;  // how many of the slot's first bytes go to staging memory
  uint32_t descriptors = 0;   // where in it the dims and entries belong
  std::vector<BoxDim> dims;
  std::vector<BoxCopy> entries;
  uint32_t bytes = 0;  // of the slot that are used

  // Instead of what the slot would carry, if its boxes are on the device already.
  std::vector<DeviceCopy> to_staging;
  std::vector<DeviceCopy> to_place;

  // Joins copies that are neighbours both in the slot and in the destination.
  void add_straight(const StraightCopy& copy);
  // Has boxes come from where they are on the device, packed. `sources`, `sizes`: of each box, as in `offsets`. The
  // slot carries the descriptors alone.
  void take_from_device(const std::vector<DeviceAddress>& sources, const std::vector<uint32_t>& sizes);
  bool is_from_device() const { return !to_staging.empty() || !to_place.empty(); }
  uint32_t entries_offset() const { return descriptors + static_cast<uint32_t>(dims.size() * sizeof(BoxDim)); }
  // Puts dims and entries where they belong in a slot.
  void write_descriptors(std::byte* slot) const;
};

// Fills a plan until the slot is full.
class SlotPacker {
 public:
  explicit SlotPacker(size_t capacity) : capacity_(capacity) {}

  // Adds a box whose loops have their destination's strides. Returns false, with nothing done, if it does not fit.
  // With `page_position` the box begins at this position within a page of the slot, and the pages that it touches are
  // its own: a direct read can then fill them. Only for boxes that are copied straight.
  bool add(const box::Loops& loops, DeviceAddress destination, std::optional<int64_t> page_position = {});
  bool empty() const { return boxes_.empty(); }
  // The plan of what was added; the packer is empty then.
  SlotPlan finish();

 private:
  struct Box {
    DeviceAddress destination;
    std::vector<BoxDim> dims;  // sizes in bytes as yet; empty if the destination is contiguous
    uint32_t bytes;
    uint32_t vector_bytes;
    bool straight;
    std::optional<uint32_t> page_position;
  };

  size_t capacity_;
  size_t used_ = 0;
  std::vector<Box> boxes_;
};

}  // namespace dcp_fast::cuda
