#include "checkpoint/tensor_pickle.h"

#include <string>
#include <thread>
#include <vector>

#include "archive_builder.h"
#include "doctest/doctest.h"
#include "exact.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::DType;
using checkpoint::PickledTensor;

namespace {

std::optional<PickledTensor> parse(const std::string& pickle) {
  return checkpoint::parse_tensor_pickle(Exact(pickle).view());
}

TensorSpec random_spec(Random& random) {
  TensorSpec spec;
  spec.dtype = static_cast<DType>(random.below(checkpoint::kDTypes.size()));
  spec.sizes = random_sizes(random, random.below(7), 0, 5);
  spec.strides = random_strides(random, spec.sizes);
  const std::vector<int64_t> offsets = {0, 1, 255, 256, 65535, 65536, 0x7FFFFFFF, 0x80000000, int64_t{1} << 50};
  spec.storage_offset = random.pick(offsets);
  spec.storage_elements = random.pick(offsets);
  spec.key = std::to_string(random.between(0, 100));
  // The builder knows the memo only for tensors of at least one dimension.
  spec.parameter = random.chance(20) && !spec.sizes.empty();
  return spec;
}

void check_parsed(const std::optional<PickledTensor>& parsed, const TensorSpec& spec) {
  REQUIRE(parsed.has_value());
  REQUIRE(parsed->dtype == spec.dtype);
  REQUIRE(parsed->storage_key == spec.key);
  REQUIRE(parsed->storage_bytes == spec.storage_elements * itemsize(spec));
  REQUIRE(parsed->storage_offset == spec.storage_offset);
  REQUIRE(parsed->sizes == spec.sizes);
  REQUIRE(parsed->strides == spec.strides);
}

void check_sane(const std::optional<PickledTensor>& parsed) {
  if (!parsed) return;
  REQUIRE(parsed->dtype >= 0);
  REQUIRE(static_cast<size_t>(parsed->dtype) < checkpoint::kDTypes.size());
  REQUIRE(parsed->storage_bytes >= 0);
  REQUIRE(parsed->storage_offset >= 0);
  REQUIRE(parsed->sizes.size() == parsed->strides.size());
  for (const Ints* values : {&parsed->sizes, &parsed->strides}) {
    for (const int64_t value : *values) REQUIRE(value >= 0);
  }
}

// The parts of tensor_pickle, so that one can be exchanged for another.
struct Parts {
  std::string function = "ctorch._utils\n_rebuild_tensor_v2\n";
  std::string mark = "(";
  std::string storage =
      Pickle().raw("(").text("storage").global("torch", "FloatStorage").text("0").text("cpu").raw("K\x06tQ").bytes;
  std::string offset = std::string("K\x00", 2);
  std::string sizes = "K\x02K\x03\x86";
  std::string strides = "K\x03K\x01\x86";
  std::string requires_grad = "\x89";
  std::string hooks = "ccollections\nOrderedDict\n)R";
  std::string more;
  std::string end = "tR.";

  std::string joined() const {
    return "\x80\x02" + function + mark + storage + offset + sizes + strides + requires_grad + hooks + more + end;
  }
};

std::string storage_of(const std::string& tag, const std::string& type, const std::string& count) {
  return Pickle().raw("(").text(tag).raw(type).text("0").text("cpu").bytes + count + "tQ";
}

const TensorSpec kSpec{0, {2, 3}, {3, 1}, 0, 6};

}  // namespace

TEST_CASE("every dtype, by storage class or by name") {
  for (size_t dtype = 0; dtype < checkpoint::kDTypes.size(); ++dtype) {
    TensorSpec spec = kSpec;
    spec.dtype = static_cast<DType>(dtype);
    CAPTURE(checkpoint::info(spec.dtype).name);
    check_parsed(parse(tensor_pickle(spec)), spec);
    // torch.load(weights_only=True) refuses the opcodes of protocol 4, and has the last word.
    CHECK_FALSE(parse(tensor_pickle_4(spec)).has_value());
    CHECK(checkpoint::dtype_by_name(checkpoint::info(spec.dtype).name) == spec.dtype);
    CHECK(checkpoint::info(spec.dtype).itemsize > 0);
  }
  CHECK(checkpoint::dtype_by_name("quint8") == checkpoint::kUnknownDType);
  CHECK(checkpoint::dtype_by_storage("") == checkpoint::kUnknownDType);
  CHECK(checkpoint::dtype_by_storage("QInt8Storage") == checkpoint::kUnknownDType);
}

TEST_CASE("random tensors and parameters are read back") {
  Random random(30);
  for (int i = 0; i < 3000; ++i) {
    const TensorSpec spec = random_spec(random);
    check_parsed(parse(tensor_pickle(spec)), spec);
  }
}

TEST_CASE("bytes after the end are left alone, as in Python") {
  check_parsed(parse(tensor_pickle(kSpec) + "rest"), kSpec);
}

TEST_CASE("anything but a plain tensor is refused") {
  CHECK(parse(Parts().joined()).has_value());
  const auto refused = [](const char* what, auto&& change) {
    CAPTURE(what);
    Parts parts;
    change(parts);
    CHECK_FALSE(parse(parts.joined()).has_value());
  };
  refused("another function", [](Parts& p) { p.function = "cos\nsystem\n"; });
  refused("another rebuild", [](Parts& p) { p.function = "ctorch._utils\n_rebuild_qtensor\n"; });
  refused("v3 without dtype", [](Parts& p) { p.function = "ctorch._utils\n_rebuild_tensor_v3\n"; });
  refused("v3 with a typed storage", [](Parts& p) {
    p.function = "ctorch._utils\n_rebuild_tensor_v3\n";
    p.more = "ctorch\nfloat32\n";
  });
  refused("a function from the text", [](Parts& p) { p.function = Pickle().text("_rebuild_tensor_v2").bytes; });
  refused("hooks", [](Parts& p) { p.hooks = "}"; });
  refused("no hooks", [](Parts& p) { p.hooks = ""; });
  refused("an ordered dict of something", [](Parts& p) { p.hooks = "ccollections\nOrderedDict\nK\x01\x85R"; });
  refused("an eighth argument", [](Parts& p) { p.more = "}}"; });
  refused("metadata that is no dict", [](Parts& p) { p.more = "\x88"; });
  refused("metadata with an item", [](Parts& p) { p.more = "}" + Pickle().text("conj").bytes + "\x88s"; });
  refused("an integer for a flag", [](Parts& p) { p.requires_grad = "K\x01"; });
  refused("sizes that are no tuple", [](Parts& p) { p.sizes = "K\x02"; });
  refused("sizes of text", [](Parts& p) { p.sizes = Pickle().text("2").text("3").bytes + "\x86"; });
  refused("sizes of flags", [](Parts& p) { p.sizes = "\x88\x88\x86"; });
  refused("a negative size", [](Parts& p) { p.sizes = "K\x02J\xff\xff\xff\xff\x86"; });
  refused("a negative stride", [](Parts& p) { p.strides = "J\xfe\xff\xff\xffK\x01\x86"; });
  refused("a negative offset", [](Parts& p) { p.offset = "J\xfe\xff\xff\xff"; });
  refused("a negative long", [](Parts& p) { p.offset = "\x8a\x01\x80"; });
  refused("a long of nine bytes", [](Parts& p) { p.offset = "\x8a\x09" + std::string(9, '\x01'); });
  refused("more sizes than strides", [](Parts& p) { p.strides = "K\x01\x85"; });
  refused("no storage", [](Parts& p) { p.storage = "K\x01"; });
  refused("another persistent id",
          [](Parts& p) { p.storage = storage_of("module", "ctorch\nFloatStorage\n", "K\x06"); });
  refused("a quantized storage",
          [](Parts& p) { p.storage = storage_of("storage", "ctorch\nQInt8Storage\n", "K\x06"); });
  refused("an untyped storage in v2",
          [](Parts& p) { p.storage = storage_of("storage", "ctorch.storage\nUntypedStorage\n", "K\x06"); });
  refused("a view of a storage",
          [](Parts& p) { p.storage = storage_of("storage", "ctorch\nFloatStorage\n", "K\x06K\x06"); });
  refused("a storage too large for its bytes", [](Parts& p) {
    p.storage = storage_of("storage", "ctorch\nDoubleStorage\n", "\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f");
  });
  refused("two values at the end", [](Parts& p) { p.mark = "K\x01" + p.mark; });
  refused("a storage alone", [](Parts& p) { p.end = "0000000."; });
  refused("an unknown opcode", [](Parts& p) { p.mark = "\xff" + p.mark; });
  refused("protocol 6", [](Parts& p) { p.function = "\x80\x06" + p.function; });
  CHECK_FALSE(parse("").has_value());
  CHECK_FALSE(parse(".").has_value());
  CHECK_FALSE(parse("\x80\x02K\x01.").has_value());
  CHECK_FALSE(parse("\x80\x02}.").has_value());
}

TEST_CASE("every truncation is refused") {
  Random random(31);
  for (int i = 0; i < 40; ++i) {
    const TensorSpec spec = random_spec(random);
    const std::string pickle = i % 2 == 0 || spec.parameter ? tensor_pickle(spec) : tensor_pickle_4(spec);
    for (size_t size = 0; size < pickle.size(); ++size) REQUIRE_FALSE(parse(pickle.substr(0, size)).has_value());
  }
}

TEST_CASE("bombs of every kind are refused, fast and on a thread of ordinary size") {
  std::vector<std::string> bombs;
  const auto repeat = [](const std::string& unit, size_t count) {
    std::string result;
    for (size_t i = 0; i < count; ++i) result += unit;
    return result;
  };
  for (const char* unit : {"\x85", "\x85q\x01", "q\x01\x85"}) bombs.push_back(")" + repeat(unit, 60000) + ".");
  for (const std::string& unit : std::vector<std::string>{"(", "(t", "}", ")", "K\x01", "\x88", "K\x01\x85\x94",
                                                          "((((t", std::string("X\x00\x00\x00\x00", 5), "\x80\x02"}) {
    bombs.push_back(repeat(unit, 10000) + ".");
  }
  const std::string large = Pickle().text(std::string(60000, 'a')).bytes;  // memo 0
  bombs.push_back(large + repeat(std::string("h\x00", 2), 5000) + ".");
  bombs.push_back(large +
                  repeat(std::string("h\x00"
                                     "0",
                                     3),
                         5000) +
                  ".");
  bombs.push_back(large + repeat("\x94", 5000) + ".");
  std::string keys = "K\x01";
  for (uint64_t i = 0; i < 4000; ++i) append(keys += 'r', i * 7919, 4);
  bombs.push_back(keys + ".");
  std::string doubling = "K\x01q" + std::string(1, '\0');
  for (int i = 0; i < 100; ++i) doubling += std::string("h\x00h\x00\x86q\x00", 7);
  bombs.push_back(doubling + ".");
  bombs.push_back("\x80\x04\x95" + std::string(8, '\xff') + ".");
  bombs.push_back("X\xff\xff\xff\xff.");
  bombs.push_back("\x8a\xff.");
  for (const char* underflow :
       {"t.", "R.", "Q.", "\x93.", "\x86.", "q\x01.", "\x94.", "h\x01.", "j\x01\x01\x01\x01."}) {
    bombs.push_back(underflow);
  }
  std::thread([&bombs] {
    for (const std::string& bomb : bombs) CHECK_FALSE(parse(bomb).has_value());
  }).join();
}

TEST_CASE("marks guard what lies below them") {
  CHECK_FALSE(parse("K\x01K\x02(\x86.").has_value());
  CHECK_FALSE(parse("K\x01(K\x02Rt.").has_value());
  Parts parts;
  parts.sizes = "K\x02(K\x03\x86";  // a mark between what TUPLE2 takes
  CHECK_FALSE(parse(parts.joined()).has_value());
}

TEST_CASE("random flips and splices are never read out of bounds and never give nonsense") {
  Random random(32);
  std::vector<std::string> originals;
  for (int i = 0; i < 20; ++i) {
    const TensorSpec spec = random_spec(random);
    originals.push_back(tensor_pickle(spec));
    if (!spec.parameter) originals.push_back(tensor_pickle_4(spec));
  }
  const std::string opcodes =
      ".\x80\x95"
      "c\x93X\x8cKMJ\x8a\x88\x89}()t\x85\x86\x87qr\x94hjQR";
  int accepted = 0;
  for (int i = 0; i < 100000; ++i) {
    std::string pickle = random.pick(originals);
    if (random.chance(30)) {
      const std::string& other = random.pick(originals);
      pickle = pickle.substr(0, random.below(pickle.size())) + other.substr(random.below(other.size()));
    }
    for (int64_t flips = random.between(0, 3); flips > 0; --flips) {
      char& byte = pickle[random.below(pickle.size())];
      byte = random.chance(60) ? opcodes[random.below(opcodes.size())] : static_cast<char>(random.between(0, 255));
    }
    const auto parsed = parse(pickle);
    check_sane(parsed);
    accepted += parsed ? 1 : 0;
  }
  CHECK(accepted > 100);
  for (int i = 0; i < 20000; ++i) {  // opcodes without any sense
    std::string pickle;
    for (int64_t size = random.between(1, 60); size > 0; --size) pickle += opcodes[random.below(opcodes.size())];
    check_sane(parse(pickle + "."));
  }
}
