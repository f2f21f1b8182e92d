#include "metadata/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "checkpoint/dtype.h"
#include "error.h"
#include "little_endian.h"
#include "metadata/collect.h"
#include "metadata/json.h"
#include "metadata/names.h"

namespace dcp_fast::metadata {

namespace {

constexpr int64_t kSizeBytes = 8;
constexpr int64_t kMostBytes = 100'000'000;  // the safetensors project's own limit

// By torch's name.
constexpr uint8_t dtype_code(std::string_view name) {
  size_t code = 0;
  while (kDTypeNames.at(code) != name) ++code;
  return static_cast<uint8_t>(code);
}

// What the format calls a dtype, its bits, and its code among kDTypeNames.
struct KnownDType {
  std::string_view name;
  int64_t bits;
  uint8_t code;
};

constexpr std::array<KnownDType, 22> kKnownDTypes = {{
    {"F32", 32, dtype_code("float32")},
    {"BF16", 16, dtype_code("bfloat16")},
    {"F16", 16, dtype_code("float16")},
    {"F64", 64, dtype_code("float64")},
    {"F8_E4M3", 8, dtype_code("float8_e4m3fn")},
    {"F8_E5M2", 8, dtype_code("float8_e5m2")},
    {"F8_E8M0", 8, dtype_code("float8_e8m0fnu")},
    {"F8_E4M3FNUZ", 8, dtype_code("float8_e4m3fnuz")},
    {"F8_E5M2FNUZ", 8, dtype_code("float8_e5m2fnuz")},
    {"F4", 4, dtype_code("float4_e2m1fn_x2")},
    {"F6_E2M3", 6, dtype_code("float6_e2m3fn")},
    {"F6_E3M2", 6, dtype_code("float6_e3m2fn")},
    {"I64", 64, dtype_code("int64")},
    {"I32", 32, dtype_code("int32")},
    {"I16", 16, dtype_code("int16")},
    {"I8", 8, dtype_code("int8")},
    {"U64", 64, dtype_code("uint64")},
    {"U32", 32, dtype_code("uint32")},
    {"U16", 16, dtype_code("uint16")},
    {"U8", 8, dtype_code("uint8")},
    {"BOOL", 8, dtype_code("bool")},
    {"C64", 64, dtype_code("complex64")},
}};

[[noreturn]] void fail(const std::string& reason, int64_t offset, int64_t length, const std::string& fqn = "") {
  Error error(ErrorKind::kCorruptHeader, reason, "", offset, length);
  error.fqn = fqn;
  throw Error(error);
}

bool is_before(const HeaderTensor& a, const HeaderTensor& b) { return a.name < b.name; }

class Parser {
 public:
  Parser(std::string_view text, int64_t file_size)
      : json_(text, kSizeBytes), payloads_(kSizeBytes + static_cast<int64_t>(text.size())), file_size_(file_size) {}

  Header parse() {
    bool has_metadata = false;
    json_.object([&](std::string&& key) {
      if (key != "__metadata__") return take_tensor(std::move(key));
      if (std::exchange(has_metadata, true)) json_.fail("__metadata__ comes twice");
      if (!json_.take_null()) take_metadata();
    });
    json_.finish();
    check_payloads();
    std::sort(header_.tensors.begin(), header_.tensors.end(), is_before);
    const auto same = [](const HeaderTensor& a, const HeaderTensor& b) { return a.name == b.name; };
    const auto twice = std::adjacent_find(header_.tensors.begin(), header_.tensors.end(), same);
    if (twice != header_.tensors.end()) fail("the tensor comes twice", kSizeBytes, payloads_ - kSizeBytes, twice->name);
    if (!sharding_.empty()) take_sharding();
    return std::move(header_);
  }

 private:
  void take_metadata() {
    std::vector<std::string> keys;
    json_.object([&](std::string&& key) {
      std::string value = json_.string();
      if (key == "DCP_SHARDING_INFO") sharding_ = std::move(value);
      keys.push_back(std::move(key));
    });
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) json_.fail("__metadata__ has a key twice: " + *twice);
  }

  void take_tensor(std::string&& name) {
    const int64_t begin = json_.position();
    HeaderTensor tensor;
    tensor.name = std::move(name);
    const KnownDType* dtype = nullptr;
    bool has_shape = false;
    bool has_offsets = false;
    sizes_.clear();
    json_.object([&](const std::string& key) {
      if (key == "dtype") {
        if (dtype != nullptr) json_.fail("a tensor has two dtypes");
        dtype = take_dtype();
      } else if (key == "shape") {
        if (std::exchange(has_shape, true)) json_.fail("a tensor has two shapes");
        json_.array([&] { sizes_.push_back(json_.count()); });
      } else if (key == "data_offsets") {
        if (std::exchange(has_offsets, true)) json_.fail("a tensor has two places");
        take_offsets(tensor);
      } else {
        json_.skip();
      }
    });
    const int64_t length = json_.position() - begin;
    if (dtype == nullptr || !has_shape || !has_offsets) fail("the tensor lacks a field", begin, length, tensor.name);
    if (const char* reason = take_sizes(tensor, *dtype)) fail(reason, begin, length, tensor.name);
    header_.tensors.push_back(std::move(tensor));
  }

  const KnownDType* take_dtype() {
    const std::string name = json_.string();
    const auto known = std::find_if(kKnownDTypes.begin(), kKnownDTypes.end(),
                                    [&name](const KnownDType& dtype) { return dtype.name == name; });
    if (known == kKnownDTypes.end()) json_.fail("an unknown dtype");
    return &*known;
  }

  void take_offsets(HeaderTensor& tensor) {
    std::array<int64_t, 2> offsets{};
    size_t count = 0;
    json_.array([&] {
      if (count == offsets.size()) json_.fail("data_offsets has more than two numbers");
      offsets.at(count++) = json_.count();
    });
    if (count != offsets.size()) json_.fail("data_offsets has less than two numbers");
    tensor.begin = offsets[0];
    tensor.end = offsets[1];
  }

  // Keeps the sizes of a tensor, in torch's elements. Returns what is wrong with them, or nullptr.
  const char* take_sizes(HeaderTensor& tensor, const KnownDType& dtype) {
    if (sizes_.size() > kMaxDims) return "the tensor has more dimensions than torch's may have";
    int64_t bits = 1;
    for (const int64_t size : sizes_) {
      if (__builtin_mul_overflow(bits, size, &bits)) return "the tensor has more elements than 63 bits count";
    }
    if (__builtin_mul_overflow(bits, dtype.bits, &bits)) return "the tensor has more bits than 63 bits count";
    constexpr int64_t kByte = 8;
    if (bits % kByte != 0) return "the tensor's elements do not fill its last byte";
    if (tensor.end < tensor.begin || tensor.end - tensor.begin != bits / kByte) {
      return "the tensor's payload has another size than its dtype and shape tell";
    }
    constexpr int64_t kPairBits = 4;
    if (dtype.bits == kPairBits) {  // torch has a type for two of them
      if (sizes_.empty() || sizes_.back() % 2 != 0) return "the tensor's rows do not fill their last byte";
      sizes_.back() /= 2;
    }
    tensor.dtype = dtype.code;
    tensor.dims = static_cast<uint32_t>(sizes_.size());
    tensor.numbers = header_.numbers.size();
    header_.numbers.resize(header_.numbers.size() + sizes_.size());
    header_.numbers.insert(header_.numbers.end(), sizes_.begin(), sizes_.end());
    return nullptr;
  }

  // Payloads must follow each other up to the end of the file.
  void check_payloads() {
    std::vector<size_t> order(header_.tensors.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [this](size_t a, size_t b) {
      const HeaderTensor& x = header_.tensors[a];
      const HeaderTensor& y = header_.tensors[b];
      return std::pair(x.begin, x.end) < std::pair(y.begin, y.end);
    });
    const int64_t most = std::numeric_limits<int64_t>::max() - payloads_;
    int64_t end = 0;
    for (const size_t i : order) {
      HeaderTensor& tensor = header_.tensors[i];
      if (tensor.end > most) fail("the tensor's payload lies beyond what 63 bits count", kSizeBytes, 0, tensor.name);
      const int64_t begin = std::exchange(end, tensor.end);
      tensor.begin += payloads_;
      tensor.end += payloads_;
      if (tensor.begin != payloads_ + begin) {
        fail(tensor.begin < payloads_ + begin ? "the tensor's payload overlaps another one"
                                              : "there is a hole before the tensor's payload",
             tensor.begin, tensor.end - tensor.begin, tensor.name);
      }
      if (tensor.end > file_size_) {
        fail("the file is only " + std::to_string(file_size_) + " bytes long", tensor.begin, tensor.end - tensor.begin,
             tensor.name);
      }
    }
    if (payloads_ + end != file_size_) {
      fail("the file has bytes behind its last payload", payloads_ + end, file_size_ - payloads_ - end);
    }
  }

  // Which chunks of global tensors these are, as torch's writer says it: JSON in a text of the JSON.
  void take_sharding() {
    if (!Json::is_text(sharding_)) fail_sharding("is no text");
    std::vector<bool> known(header_.tensors.size());
    Json json(sharding_, kSizeBytes);
    try {
      json.object([&](const std::string& key) {
        const HeaderTensor* tensor = header_.find(key);
        if (tensor == nullptr) return json.skip();
        const auto number = static_cast<size_t>(tensor - header_.tensors.data());
        if (known[number]) fail_sharding("names it twice", key);
        known[number] = take_chunk(json, *tensor);
      });
      json.finish();
    } catch (Error& error) {
      if (error.fqn.empty()) fail_sharding(error.what());
      throw;
    }
    const auto unknown = std::find(known.begin(), known.end(), false);
    if (unknown != known.end()) {
      fail_sharding("does not place it", header_.tensors[static_cast<size_t>(unknown - known.begin())].name);
    }
  }

  bool take_chunk(Json& json, const HeaderTensor& tensor) {
    bool is_known = false;
    json.object([&](const std::string& key) {
      if (key != "saved_offsets") return json.skip();
      if (std::exchange(is_known, true)) fail_sharding("places it twice", tensor.name);
      int64_t* offsets = header_.numbers.data() + tensor.numbers;
      size_t dims = 0;
      json.array([&] {
        if (dims == tensor.dims) fail_sharding("has more offsets than it has dimensions", tensor.name);
        offsets[dims++] = json.count();
      });
      if (dims != tensor.dims) fail_sharding("has fewer offsets than it has dimensions", tensor.name);
      if (!is_sound(offsets, offsets + dims, dims)) fail_sharding("places it beyond what 63 bits count", tensor.name);
    });
    return is_known;
  }

  [[noreturn]] void fail_sharding(const std::string& reason, const std::string& fqn = "") const {
    fail("DCP_SHARDING_INFO " + reason, kSizeBytes, payloads_ - kSizeBytes, fqn);
  }

  Json json_;
  const int64_t payloads_;  // where they begin
  const int64_t file_size_;
  Header header_;
  std::vector<int64_t> sizes_;  // of the tensor that is parsed; kept for its memory
  std::string sharding_;
};

}  // namespace

const HeaderTensor* Header::find(std::string_view name) const {
  const auto found =
      std::lower_bound(tensors.begin(), tensors.end(), name,
                       [](const HeaderTensor& tensor, std::string_view key) { return tensor.name < key; });
  return found == tensors.end() || found->name != name ? nullptr : &*found;
}

Header read_header(const io::ByteSource& source, io::IoCounters& counters) {
  if (source.size() < kSizeBytes) fail("the file is too short to have a header", 0, kSizeBytes);
  std::array<std::byte, kSizeBytes> bytes{};
  source.read_exactly(bytes.data(), bytes.size(), 0, counters);
  const uint64_t size = from_little_endian(bytes.data(), bytes.size());
  if (size > static_cast<uint64_t>(kMostBytes)) {
    fail("the file says that its header has " + std::to_string(size) + " bytes, and more than " +
             std::to_string(kMostBytes) + " are not allowed",
         0, kSizeBytes);
  }
  const auto length = static_cast<int64_t>(size);
  if (length > source.size() - kSizeBytes) {
    fail("the file is only " + std::to_string(source.size()) + " bytes long", kSizeBytes, length);
  }
  const std::string text = read_json(source, kSizeBytes, length, counters);
  return parse_header(text, source.size());
}

Header parse_header(std::string_view text, int64_t file_size) { return Parser(text, file_size).parse(); }

std::string read_json(const io::ByteSource& source, int64_t offset, int64_t size, io::IoCounters& counters) {
  std::string text(static_cast<size_t>(size), '\0');
  source.read_exactly(text.data(), text.size(), offset, counters);
  if (!Json::is_text(text)) fail("the JSON is not UTF-8", offset, size);
  return text;
}

}  // namespace dcp_fast::metadata
