// What a rank needs of the checkpoint's files, in a form that ranks send each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "box/box.h"

namespace dcp_fast::exchange {

inline constexpr int64_t kMostGrain = 16;  // bytes

struct NeededFile {
  std::string name;  // the same on all ranks
  int64_t size = 0;  // by these two ranks notice that they see different files
  int64_t version = 0;
};

// The bytes of one box. Where they go is the business of the rank alone.
struct NeededBox {
  uint32_t file = 0;  // index into the need's files
  uint32_t depth = 0;
  size_t loops = 0;     // where its loops begin among those of the need
  int64_t begin = 0;    // of the first byte, in the file
  int64_t end = 0;      // past the last one
  int32_t grain = 1;    // bytes of an element: no box is cut within one
  uint32_t number = 0;  // in the order in which boxes were added
};

class Need {
 public:
  explicit Need(std::vector<NeededFile> files) : files_(std::move(files)) {}

  // Adds a box whose loops are not empty, sorted and disjoint. Their destinations are left out.
  void add(uint32_t file, int64_t begin, const box::Loops& loops, int32_t grain);

  // As words of 64 bits: the numbers of files, boxes and loops; of each file that has boxes its size and version, the
  // length of its name in bytes and the name; of each box its file, depth, first byte and grain; of each loop its size
  // and stride.
  std::vector<int64_t> encode() const;
  // Throws std::invalid_argument if that is not what encode() makes.
  static Need decode(const int64_t* words, size_t count);

  const std::vector<NeededFile>& files() const { return files_; }
  // After number_files() in ascending order of file and first byte.
  const std::vector<NeededBox>& boxes() const { return boxes_; }
  const box::Dim* loops(const NeededBox& box) const { return loops_.data() + box.loops; }

  // Gives each file the number that all ranks have for it, and sorts the boxes.
  void number_files(const std::vector<uint32_t>& numbers);

  // Adds a box of another need, whose files have those numbers. It lies behind all others in ascending order.
  void append(const Need& other, NeededBox box);

  // Calls `function(box)` for the boxes that touch [begin, end) of a file, in order. After number_files().
  template <typename Function>
  void each_within(uint32_t file, int64_t begin, int64_t end, const Function& function) const {
    for (size_t i = first_within(file, begin); i < boxes_.size(); ++i) {
      const NeededBox& box = boxes_[i];
      if (box.file != file || box.begin >= end) break;
      if (box.end > begin) function(box);
    }
  }

  // How many bytes of a box lie in [begin, end) of its file.
  int64_t bytes_within(const NeededBox& box, int64_t begin, int64_t end) const;

 private:
  size_t first_within(uint32_t file, int64_t begin) const;
  void add_reach(const NeededBox& box);

  std::vector<NeededFile> files_;
  std::vector<NeededBox> boxes_;
  std::vector<box::Dim> loops_;
  std::vector<int64_t> reach_;  // the furthest end of each box and those before it in the same file
};

}  // namespace dcp_fast::exchange
