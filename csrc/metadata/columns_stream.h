// Columns as a stream of bytes from one process to others that run the same build: what one rank parsed, for the rest.
//
// The first section of the stream holds all that is small or has a structure. The arrays follow as they lie in memory,
// so that neither side holds more than the columns and whatever block of the stream it is at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "metadata/columns.h"

namespace dcp_fast::metadata {

// How many sections a stream has.
size_t section_count();

class ColumnsEncoder {
 public:
  // `file_bytes`: the size of the file that the columns are of, which bounds what a decoder accepts. Throws Unsupported
  // for columns that no decoder would take.
  ColumnsEncoder(std::shared_ptr<const Columns> columns, uint64_t file_bytes);

  // Bytes of each section.
  const std::vector<uint64_t>& sizes() const { return sizes_; }

  // Writes the next bytes of the stream, and returns how many: fewer than `size` only where the stream ends.
  size_t read(std::byte* to, size_t size);

 private:
  struct Section {
    const std::byte* data;
    uint64_t size;
  };

  std::shared_ptr<const Columns> columns_;
  std::vector<uint8_t> first_;
  std::vector<Section> sections_;
  std::vector<uint64_t> sizes_;
  size_t section_ = 0;
  uint64_t position_ = 0;  // within the section
};

// Makes columns of a stream that it does not trust: whatever the bytes are, there is an error, or columns that hold
// together as those of a file do. Memory is only touched as bytes arrive.
class ColumnsDecoder {
 public:
  // Both: as the encoder has them. Throws Error(kCorruptMetadata) if no file of that size has columns of such sizes.
  ColumnsDecoder(std::vector<uint64_t> sizes, uint64_t file_bytes);
  ColumnsDecoder(const ColumnsDecoder&) = delete;
  ColumnsDecoder& operator=(const ColumnsDecoder&) = delete;

  // Takes the next bytes of the stream. Throws Error(kCorruptMetadata) if there are more than the sizes say.
  void write(const std::byte* from, size_t size);

  // The columns, once all is there; the decoder is of no use after that. Throws Error(kCorruptMetadata).
  Columns finish();

 private:
  struct Section {
    void* array;
    // Makes room for so many bytes in all, and returns where the array begins.
    std::byte* (*grow)(void* array, size_t bytes);
  };

  // Steps over sections that are full, and tells whether all are.
  bool is_complete();

  Columns columns_;
  std::vector<uint8_t> first_;
  std::vector<Section> sections_;
  std::vector<uint64_t> sizes_;
  uint64_t file_bytes_;
  size_t section_ = 0;
  uint64_t position_ = 0;
};

}  // namespace dcp_fast::metadata
