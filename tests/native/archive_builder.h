// Writes what torch.save writes, byte by byte: pickles of plain tensors and the zip archives around them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/dtype.h"

namespace dcp_fast::testing {

// Little-endian integers appended to a string of bytes.
void append(std::string& bytes, uint64_t value, size_t width);

// Opcodes as Python's pickle module writes them with protocol 2, numbering memo entries from 0.
class Pickle {
 public:
  std::string bytes;

  Pickle& raw(const std::string& opcodes);
  Pickle& protocol(uint8_t version);
  Pickle& global(const std::string& module, const std::string& name);
  Pickle& text(const std::string& value);
  Pickle& integer(int64_t value);
  Pickle& integers(const std::vector<int64_t>& values);  // a tuple
  Pickle& boolean(bool value);
  Pickle& tuple(size_t count);  // of the last one, two or three values
  Pickle& put();

 private:
  uint32_t memo_ = 0;
};

struct TensorSpec {
  checkpoint::DType dtype = 0;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // elements
  int64_t storage_offset = 0;    // elements
  int64_t storage_elements = 0;
  std::string key = "0";
  bool parameter = false;
};

// data.pkl of a tensor: _rebuild_tensor_v2 for dtypes with a storage class of their own, else _rebuild_tensor_v3.
std::string tensor_pickle(const TensorSpec& spec);

// The same tensor with the opcodes of protocol 4: frames, short strings, STACK_GLOBAL and MEMOIZE.
std::string tensor_pickle_4(const TensorSpec& spec);

int64_t itemsize(const TensorSpec& spec);

class Archive {
 public:
  size_t alignment = 64;   // of every entry's data
  bool zip64_end = true;   // torch.save writes the zip64 end records always
  bool checksums = true;   // false: torch.serialization.set_crc32_options(False)
  size_t descriptor = 16;  // bytes: 12, 16, 20 or 24, or 0 for none. torch.save writes 16, with a signature.
  bool padded = true;      // false: no padding to the alignment, as other zip writers
  std::string root = "archive";

  void add(const std::string& name, const std::string& data);
  std::string finish() const;

  // The seven entries of a tensor's archive.
  static Archive of_tensor(const std::string& pickle, const std::string& storage, size_t alignment = 64,
                           const std::string& byteorder = "little");

 private:
  struct Entry {
    std::string name;
    std::string data;
  };
  std::vector<Entry> entries_;
};

std::string tensor_record(const TensorSpec& spec, const std::string& storage, size_t alignment = 64);

}  // namespace dcp_fast::testing
