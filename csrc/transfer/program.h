// The transfer program: boxes x layouts x destinations, checked and ready to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "box/box.h"
#include "checkpoint/dtype.h"
#include "copy/convert.h"
#include "transfer/layouts.h"

namespace dcp_fast::transfer {

// Where a tensor's elements lie as they are: the ordinal of a CUDA device, or one of these.
constexpr int kHost = -1;
constexpr int kElsewhere = -2;  // in memory that only torch can write, or in a form that only torch knows

// A tensor that items are placed in.
struct Destination {
  std::byte* data = nullptr;  // an address on the device, if it lies on one
  int device = kElsewhere;
  checkpoint::DType dtype = checkpoint::kUnknownDType;
  int64_t itemsize = 0;  // bytes of an element, which `dtype` does not tell if it is unknown
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // elements
};

// A box to copy from a stored tensor into a destination: a ReadItem.
struct Item {
  size_t record = 0;
  size_t destination = 0;
  std::vector<int64_t> storage_offsets;
  std::vector<int64_t> destination_offsets;
  std::vector<int64_t> lengths;
};

struct Transfer {
  enum class Kind {
    kDirect,     // the engine copies it, and converts it if it knows how
    kConverted,  // read natively, then placed by torch: a rare pair of dtypes, a dtype other than the stored one on a
                 // GPU, elsewhere, or a destination that overlaps itself
    kFallback,   // torch.load must read the record
  };
  Kind kind = Kind::kDirect;
  int32_t wave = 0;
  int64_t source = 0;  // kDirect: the box's first byte in its file
  int device = kHost;
  std::byte* destination = nullptr;
  box::Loops loops;                            // kDirect; empty if the box is
  std::optional<copy::Conversion> conversion;  // kDirect: if the destination has another dtype than what is stored
};

class Program {
 public:
  // Throws Error(kSizeMismatch) with `item` set if a box does not fit its stored tensor or its destination.
  // `layouts` must outlive the program. Items come in torch's order within each file; files are numbered by first use.
  Program(const Layouts& layouts, std::vector<Item> items, const std::vector<Destination>& destinations);

  const Layouts& layouts() const { return layouts_; }
  const std::vector<Item>& items() const { return items_; }
  const std::vector<Transfer>& transfers() const { return transfers_; }
  int32_t waves() const { return static_cast<int32_t>(items_by_wave_.size()); }
  // The indices of the items of a wave, in torch's order. Throws std::out_of_range.
  const std::vector<size_t>& items_in_wave(int32_t wave) const { return items_by_wave_.at(static_cast<size_t>(wave)); }
  // Payload bytes of all boxes that are read natively.
  int64_t bytes_needed() const { return bytes_needed_; }
  // The same of one wave. Throws std::out_of_range.
  int64_t bytes_needed(int32_t wave) const;

  // Makes other waves of a program that has one: of the items that are given for each, in that order. Throws
  // std::invalid_argument if the program has several, as boxes share memory, or unless each item is given once.
  void cut(std::vector<std::vector<size_t>> waves);

 private:
  void prepare(size_t index, const Destination& destination);
  int64_t bytes_of(size_t index) const;

  const Layouts& layouts_;
  std::vector<Item> items_;
  std::vector<Transfer> transfers_;
  std::vector<std::vector<size_t>> items_by_wave_;
  int64_t bytes_needed_ = 0;
};

}  // namespace dcp_fast::transfer
