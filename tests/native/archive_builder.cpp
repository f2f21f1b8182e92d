#include "archive_builder.h"

#include "checkpoint/zip.h"

namespace dcp_fast::testing {

void append(std::string& bytes, uint64_t value, size_t width) {
  for (size_t i = 0; i < width; ++i) bytes.push_back(i < 8 ? static_cast<char>(value >> (8 * i)) : '\0');
}

Pickle& Pickle::raw(const std::string& opcodes) {
  bytes += opcodes;
  return *this;
}

Pickle& Pickle::protocol(uint8_t version) {
  bytes += '\x80';
  append(bytes, version, 1);
  return *this;
}

Pickle& Pickle::global(const std::string& module, const std::string& name) {
  bytes += "c" + module + "\n" + name + "\n";
  return put();
}

Pickle& Pickle::text(const std::string& value) {
  bytes += 'X';
  append(bytes, value.size(), 4);
  bytes += value;
  return put();
}

Pickle& Pickle::integer(int64_t value) {
  const auto bits = static_cast<uint64_t>(value);
  if (value >= 0 && value < 256) {
    bytes += 'K';
    append(bytes, bits, 1);
  } else if (value >= 0 && value < 65536) {
    bytes += 'M';
    append(bytes, bits, 2);
  } else if (value >= INT32_MIN && value <= INT32_MAX) {
    bytes += 'J';
    append(bytes, bits, 4);
  } else {
    size_t width = 8;
    while (width > 1 && static_cast<int64_t>(bits << (64 - 8 * (width - 1))) >> (64 - 8 * (width - 1)) == value)
      --width;
    bytes += '\x8a';
    append(bytes, width, 1);
    append(bytes, bits, width);
  }
  return *this;
}

Pickle& Pickle::integers(const std::vector<int64_t>& values) {
  if (values.empty()) return raw(")");
  if (values.size() > 3) raw("(");
  for (const int64_t value : values) integer(value);
  return values.size() > 3 ? raw("t").put() : tuple(values.size());
}

Pickle& Pickle::boolean(bool value) { return raw(value ? "\x88" : "\x89"); }

Pickle& Pickle::tuple(size_t count) {
  bytes += static_cast<char>(0x84 + count);
  return put();
}

Pickle& Pickle::put() {
  if (memo_ < 256) {
    bytes += 'q';
    append(bytes, memo_++, 1);
  } else {
    bytes += 'r';
    append(bytes, memo_++, 4);
  }
  return *this;
}

int64_t itemsize(const TensorSpec& spec) { return checkpoint::info(spec.dtype).itemsize; }

std::string tensor_pickle(const TensorSpec& spec) {
  const checkpoint::DTypeInfo& dtype = checkpoint::info(spec.dtype);
  const bool untyped = dtype.storage.empty();
  Pickle pickle;
  pickle.protocol(2);
  if (spec.parameter) pickle.global("torch._utils", "_rebuild_parameter");
  pickle.global("torch._utils", untyped ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2").raw("((").text("storage");
  if (untyped) {
    pickle.global("torch.storage", "UntypedStorage");
  } else {
    pickle.global("torch", std::string(dtype.storage));
  }
  pickle.text(spec.key).text("cpu");
  pickle.integer(spec.storage_elements * (untyped ? dtype.itemsize : 1)).raw("t").put().raw("Q");
  pickle.integer(spec.storage_offset).integers(spec.sizes).integers(spec.strides).boolean(false);
  pickle.global("collections", "OrderedDict").raw(")R").put();
  if (untyped) pickle.global("torch", std::string(dtype.name));
  pickle.raw("t").put().raw("R").put();
  if (spec.parameter) {
    // OrderedDict comes from the memo: entry 8 of a plain tensor, and one later for each of what stands before it.
    const int64_t empty_sizes = spec.sizes.empty() ? 2 : 0;
    pickle.boolean(true).raw("h");
    append(pickle.bytes, static_cast<uint64_t>(9 - empty_sizes), 1);
    pickle.raw(")R").put().tuple(3).raw("R").put();
  }
  return pickle.raw(".").bytes;
}

std::string tensor_pickle_4(const TensorSpec& spec) {
  const checkpoint::DTypeInfo& dtype = checkpoint::info(spec.dtype);
  const bool untyped = dtype.storage.empty();
  std::string body;
  const auto text = [&body](const std::string& value) {
    body += '\x8c';
    append(body, value.size(), 1);
    body += value + '\x94';
  };
  const auto global = [&](const std::string& module, const std::string& name) {
    text(module);
    text(name);
    body += "\x93\x94";
  };
  const auto integers = [&body](const std::vector<int64_t>& values) {
    body += '(';
    for (const int64_t value : values) body += Pickle().integer(value).bytes;
    body += values.empty() ? "t" : "t\x94";
  };
  global("torch._utils", untyped ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  body += "((";
  text("storage");
  global(untyped ? "torch.storage" : "torch", untyped ? "UntypedStorage" : std::string(dtype.storage));
  text(spec.key);
  text("cpu");
  body += Pickle().integer(spec.storage_elements * (untyped ? dtype.itemsize : 1)).bytes + "t\x94Q";
  body += Pickle().integer(spec.storage_offset).bytes;
  integers(spec.sizes);
  integers(spec.strides);
  body += '\x89';
  global("collections", "OrderedDict");
  body += ")R\x94";
  if (untyped) global("torch", std::string(dtype.name));
  body += "t\x94R\x94.";
  std::string framed = "\x80\x04\x95";
  append(framed, body.size(), 8);
  return framed + body;
}

void Archive::add(const std::string& name, const std::string& data) { entries_.push_back({root + "/" + name, data}); }

std::string Archive::finish() const {
  std::string bytes;
  std::string directory;
  for (const Entry& entry : entries_) {
    const auto* data = reinterpret_cast<const std::byte*>(entry.data.data());
    const uint32_t crc = checksums ? checkpoint::crc32(data, entry.data.size()) : 0;
    const size_t header = bytes.size();
    const size_t unpadded = header + 30 + entry.name.size() + 4;
    const size_t padding = (alignment - unpadded % alignment) % alignment;
    const uint64_t flags = descriptor > 0 ? 0x808 : 0x800;  // UTF-8 names, sizes in a data descriptor
    append(bytes, 0x04034b50, 4);
    append(bytes, 0, 2);
    append(bytes, flags, 2);
    for (int i = 0; i < 9; ++i) append(bytes, 0, 2);
    append(bytes, entry.name.size(), 2);
    append(bytes, padded ? padding + 4 : 0, 2);
    bytes += entry.name;
    if (padded) {
      bytes += "FB";
      append(bytes, padding, 2);
      bytes.append(padding, 'Z');
    }
    bytes += entry.data;
    if (descriptor == 16 || descriptor == 24) append(bytes, 0x08074b50, 4);
    if (descriptor > 0) {
      append(bytes, crc, 4);
      append(bytes, entry.data.size(), descriptor < 20 ? 4 : 8);
      append(bytes, entry.data.size(), descriptor < 20 ? 4 : 8);
    }

    append(directory, 0x02014b50, 4);
    append(directory, 0, 4);
    append(directory, flags, 2);
    append(directory, 0, 6);
    append(directory, crc, 4);
    append(directory, entry.data.size(), 4);
    append(directory, entry.data.size(), 4);
    append(directory, entry.name.size(), 2);
    append(directory, 0, 12);
    append(directory, header, 4);
    directory += entry.name;
  }
  const size_t begin = bytes.size();
  bytes += directory;
  if (zip64_end) {
    const size_t end = bytes.size();
    append(bytes, 0x06064b50, 4);
    append(bytes, 44, 8);
    append(bytes, 0x031e, 2);
    append(bytes, 0x002d, 2);
    append(bytes, 0, 8);
    append(bytes, entries_.size(), 8);
    append(bytes, entries_.size(), 8);
    append(bytes, directory.size(), 8);
    append(bytes, begin, 8);
    append(bytes, 0x07064b50, 4);
    append(bytes, 0, 4);
    append(bytes, end, 8);
    append(bytes, 1, 4);
  }
  append(bytes, 0x06054b50, 4);
  append(bytes, 0, 4);
  append(bytes, entries_.size(), 2);
  append(bytes, entries_.size(), 2);
  append(bytes, directory.size(), 4);
  append(bytes, begin, 4);
  append(bytes, 0, 2);
  return bytes;
}

Archive Archive::of_tensor(const std::string& pickle, const std::string& storage, size_t alignment,
                           const std::string& byteorder) {
  Archive archive;
  archive.alignment = alignment;
  archive.add("data.pkl", pickle);
  archive.add(".format_version", "1");
  archive.add(".storage_alignment", std::to_string(alignment));
  archive.add("byteorder", byteorder);
  archive.add("data/0", storage);
  archive.add("version", "3\n");
  archive.add(".data/serialization_id", "1572819951185464302603622430115872126654");
  return archive;
}

std::string tensor_record(const TensorSpec& spec, const std::string& storage, size_t alignment) {
  return Archive::of_tensor(tensor_pickle(spec), storage, alignment).finish();
}

}  // namespace dcp_fast::testing
