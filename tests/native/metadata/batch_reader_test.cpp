// The reader of batches against the unpickler without it: the same columns or the same error, whatever the file holds.
#include "metadata/batch_reader.h"

#include <algorithm>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "metadata/columns_text.h"
#include "metadata/metadata_pickle.h"
#include "metadata/pickler.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using metadata::Batches;

namespace {

constexpr std::string_view kFileSystem = "torch.distributed.checkpoint.filesystem";

using Shape = std::vector<int64_t>;

// What of a file pickle might have written in another way.
struct Habits {
  int protocol = 4;
  size_t batch = 1000;
  bool later_fields = false;
  int oddity = 0;  // in percent: how many items are out of the ordinary
};

class RandomMetadata {
 public:
  RandomMetadata(Random& random, const Habits& habits) : random_(random), habits_(habits), out_(habits.protocol) {}

  std::string write(size_t entries, size_t chunks) {
    out_.name("state_dict_metadata");
    open('}');
    for (size_t i = 0; i < entries; ++i) entry("layer." + std::to_string(i) + ".weight", random_.below(chunks + 1));
    out_.pickle() += 'u';
    out_.name("planner_data");
    open('}');
    for (size_t i = 0; i < entries; ++i) {
      out_.name("layer." + std::to_string(i) + ".weight");
      recall_or([&] { out_.pickle() += 'N'; }, texts_);
    }
    out_.pickle() += 'u';
    out_.name("storage_data");
    open('}');
    size_t left = rows_.size();
    while (left > 0) {
      for (size_t i = std::min(habits_.batch, left); i > 0; --i) row(rows_[rows_.size() - left--]);
      out_.pickle() += left > 0 ? "u(" : "";
    }
    out_.pickle() += 'u';
    return out_.finish();
  }

 private:
  struct Row {
    std::string fqn;
    Shape offset;
    bool is_bytes;
  };

  bool oddly() { return random_.chance(habits_.oddity); }
  void open(char container) {
    out_.pickle() += container;
    out_.put();
    out_.pickle() += '(';
  }
  // At times something from the memo in place of what is written.
  template <typename Write>
  void recall_or(const Write& write, const std::vector<uint32_t>& known) {
    if (!known.empty() && oddly()) {
      out_.get(random_.pick(known));
    } else {
      write();
    }
  }
  void size(const Shape& shape, std::vector<uint32_t>& known) {
    recall_or([&] { known.push_back(out_.size(shape)); }, known);
  }

  void entry(const std::string& fqn, size_t chunk_count) {
    texts_.push_back(out_.text(fqn));
    if (random_.chance(15)) {
      out_.object(kCheckpoint, "BytesStorageMetadata");
      rows_.push_back({fqn, {}, true});
      return;
    }
    const size_t dims = random_.below(6);
    // Those of other dimensions are refused, and that is tested too, but not in every file.
    std::vector<uint32_t>& sizes = sizes_[random_.chance(habits_.oddity / 4) ? random_.below(6) : dims];
    out_.begin_object(kCheckpoint, "TensorStorageMetadata");
    out_.name("properties");
    out_.pickle() += properties();
    out_.name("size");
    size(Shape(dims, 7), sizes);
    out_.name("chunks");
    open(']');
    for (size_t i = 0; i < chunk_count; ++i) {
      if (i > 0 && i % habits_.batch == 0) out_.pickle() += "e(";
      chunk(fqn, dims, sizes);
    }
    out_.pickle() += "eub";
  }

  void chunk(const std::string& fqn, size_t dims, std::vector<uint32_t>& sizes) {
    Shape offset(dims);
    for (int64_t& number : offset) number = random_.pick(Shape{0, 1, 255, 256, 65536, int64_t{1} << 40});
    rows_.push_back({fqn, offset, false});
    out_.begin_object(kCheckpoint, "ChunkStorageMetadata");
    out_.name("offsets");
    size(offset, sizes);
    out_.name("sizes");
    size(Shape(dims, random_.chance(habits_.oddity / 8) ? -1 : 300), sizes);
    later_field("checksum");
    out_.pickle() += "ub";
  }

  void row(const Row& row) {
    out_.begin_object(kCheckpoint, "MetadataIndex");
    out_.name("fqn");
    recall_or(
        [&] { random_.chance(50) ? static_cast<void>(texts_.push_back(out_.text(row.fqn))) : out_.name(row.fqn); },
        texts_);
    out_.name("index");
    if (row.is_bytes) {
      out_.pickle() += 'N';
    } else {
      out_.number(random_.between(0, 1000));
      out_.name("offset");
      size(row.offset, sizes_[row.offset.size()]);
    }
    out_.pickle() += "ub";
    out_.begin_object(kFileSystem, "_StorageInfo");
    out_.name("relative_path");
    random_.chance(10) ? static_cast<void>(out_.text("__0_0.distcp")) : out_.name("__1_0.distcp");
    out_.name("offset");
    out_.number(random_.between(0, int64_t{1} << 40));
    out_.name("length");
    out_.number(random_.between(-3, 100'000));
    if (oddly()) {
      out_.name("transform_descriptors");
      out_.pickle() += random_.chance(30) ? "N" : list({text("zstd")});
    }
    later_field(random_.chance(habits_.oddity / 8) ? "length" : "crc");
    out_.pickle() += "ub";
  }

  // As a later torch may write, in all items or in none.
  void later_field(std::string_view name) {
    if (!habits_.later_fields) return;
    out_.name(std::string(name));
    random_.chance(20) ? static_cast<void>(out_.pickle() += 'N') : out_.number(random_.between(0, 1 << 20));
    if (oddly()) {
      out_.name("more");
      out_.pickle() += random_.pick(std::vector<std::string>{"\x88", "\x89", ")", "]"});
    }
  }

  Random& random_;
  Habits habits_;
  Pickler out_;
  std::vector<Row> rows_;
  // Of the memo:
  std::vector<uint32_t> texts_;
  std::vector<uint32_t> sizes_[6];  // by dimensions
};

std::string odd_pickle(Random& random, int oddity) {
  Habits habits;
  habits.protocol = static_cast<int>(random.between(2, 5));
  habits.batch = random.pick(std::vector<size_t>{1, 2, 5, 1000});
  habits.oddity = oddity;
  habits.later_fields = random.chance(30);
  return RandomMetadata(random, habits).write(random.below(6), random.pick(std::vector<size_t>{1, 4, 12}));
}

// How long the opcode at a position is, with its argument, of those that the pickler writes.
size_t opcode_bytes(const std::string& pickle, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(pickle[at + i]); };
  switch (byte(0)) {
    case 'c':
      return pickle.find('\n', pickle.find('\n', at) + 1) + 1 - at;
    case 'X':
      return 5 + (size_t{byte(1)} | size_t{byte(2)} << 8);
    case 0x8a:
    case 0x8c:
      return 2 + byte(1);
    case 'r':
    case 'j':
    case 'J':
      return 5;
    case 'M':
      return 3;
    case 0x80:
    case 'q':
    case 'h':
    case 'K':
      return 2;
    default:
      return 1;
  }
}

// With frames where pickle begins them, which may be before any opcode. Their lengths mean nothing, if only the file
// has as many bytes.
std::string framed(Random& random, const std::string& pickle, int percent) {
  std::string result;
  for (size_t at = 0; at < pickle.size();) {
    if (at > 0 && random.chance(percent)) {
      const auto left = static_cast<int64_t>(pickle.size() - at);
      const bool fits = random.chance(99);
      result += '\x95' + little_endian(static_cast<uint64_t>(fits ? random.between(0, left) : 10 * left + 1000), 8);
    }
    const size_t size = opcode_bytes(pickle, at);
    result += pickle.substr(at, size);
    at += size;
  }
  return result;
}

bool same_in_both(const std::string& pickle) {
  return parsed(pickle, Batches::kAtOnce) == parsed(pickle, Batches::kOneByOne);
}

bool is_columns(const std::string& text) { return text.find(" tensor ") != std::string::npos; }

}  // namespace

TEST_CASE("the reader of batches reads what the unpickler reads") {
  Random random(11);
  int read = 0;
  int refused = 0;
  for (int i = 0; i < 1'000; ++i) {
    const std::string pickle = odd_pickle(random, random.pick(std::vector<int>{0, 0, 5, 30}));
    REQUIRE(same_in_both(pickle));
    ++(is_columns(parsed(pickle, Batches::kAtOnce)) ? read : refused);
  }
  CHECK(read > 500);
  CHECK(refused > 100);
}

TEST_CASE("frames begin anywhere, also within items") {
  Random random(13);
  int read = 0;
  int refused = 0;
  for (int i = 0; i < 1'000; ++i) {
    const std::string plain = odd_pickle(random, random.pick(std::vector<int>{0, 0, 5}));
    const std::string pickle = framed(random, plain, random.pick(std::vector<int>{1, 3, 20}));
    const std::string columns = parsed(pickle, Batches::kAtOnce);
    REQUIRE(columns == parsed(pickle, Batches::kOneByOne));
    if (is_columns(columns)) REQUIRE(columns == parsed(plain, Batches::kOneByOne));
    ++(is_columns(columns) ? read : refused);
  }
  CHECK(read > 200);
  CHECK(refused > 100);
}

TEST_CASE("the reader of batches refuses what the unpickler refuses") {
  Random random(12);
  int read = 0;
  int refused = 0;
  for (int i = 0; i < 4'000; ++i) {
    std::string pickle = odd_pickle(random, random.pick(std::vector<int>{0, 10}));
    for (int64_t left = random.between(1, 3); left > 0 && !pickle.empty(); --left) {
      const size_t at = random.below(pickle.size());
      switch (random.below(5)) {
        case 0:
          pickle[at] = static_cast<char>(pickle[at] ^ (1 << random.below(8)));
          break;
        case 1:
          pickle.erase(at, random.below(4) + 1);
          break;
        case 2:
          pickle.insert(at, pickle, random.below(pickle.size()), random.below(60));
          break;
        case 3:
          pickle[at] = random.pick(std::vector<char>{'u', 'e', 'b', ')', '(', 'h', 'K', 'N', '\x94', '\x85'});
          break;
        default:
          pickle.resize(at + 1);
      }
    }
    REQUIRE(same_in_both(pickle));
    ++(is_columns(parsed(pickle, Batches::kAtOnce)) ? read : refused);
  }
  CHECK(read > 50);
  CHECK(refused > 3'000);
}

TEST_CASE("what the reader of batches memoized can be asked for") {
  // Two batches of chunks and of rows: the first ones teach the memo all names, so the second ones are read at once.
  const auto write = [](const auto& write_more) {
    Pickler out(4);
    std::vector<uint32_t> sizes;
    const auto chunk = [&](int64_t at) {
      out.begin_object(kCheckpoint, "ChunkStorageMetadata");
      out.name("offsets");
      sizes.push_back(out.size({at, 0}));
      out.name("sizes");
      sizes.push_back(out.size({1, 2}));
      out.pickle() += "ub";
    };
    out.name("state_dict_metadata");
    out.pickle() += '}';
    out.put();
    out.pickle() += '(';
    out.name("a");
    out.begin_object(kCheckpoint, "TensorStorageMetadata");
    out.name("properties");
    out.pickle() += properties();
    out.name("size");
    out.size({6, 2});
    out.name("chunks");
    out.pickle() += "](";
    chunk(0);
    chunk(1);
    out.pickle() += "e(";
    chunk(2);
    const uint32_t object = sizes.back() + 1;
    chunk(3);
    out.pickle() += "eub";
    write_more(out, sizes, object);
    return out.finish();
  };
  const auto tensor_of = [](Pickler& out, uint32_t size) {
    out.name("b");
    out.begin_object(kCheckpoint, "TensorStorageMetadata");
    out.name("properties");
    out.pickle() += properties();
    out.name("size");
    out.get(size);
    out.get(size);
    out.pickle() += '0';
    out.name("chunks");
    out.pickle() += "]ubu";
  };
  for (const size_t i : {4, 5, 6, 7}) {
    CAPTURE(i);
    const std::string pickle =
        write([&](Pickler& out, const std::vector<uint32_t>& sizes, uint32_t) { tensor_of(out, sizes[i]); });
    CHECK(same_in_both(pickle));
    const std::string expected = i % 2 == 0 ? std::to_string(i / 2) + ",0, " : "1,2, ";
    CHECK(parsed(pickle, Batches::kAtOnce).find("b tensor " + expected) != std::string::npos);
  }
  // A chunk itself, which no writer asks for again.
  const std::string pickle =
      write([&](Pickler& out, const std::vector<uint32_t>&, uint32_t object) { tensor_of(out, object); });
  CHECK(parsed(pickle, Batches::kAtOnce).find("a part of an object that is used again") == 0);
  CHECK(same_in_both(pickle));
}
