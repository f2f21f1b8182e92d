#include "metadata/plain_pickle.h"

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "checkpoint/bytes.h"
#include "metadata/failure.h"

namespace dcp_fast::metadata {

namespace {

// Python's own pickler gives up at a fraction of it.
constexpr size_t kMaxDepth = 1000;

// Numbers that differ by a multiple of it have one hash in Python, and so have tuples of them. Keys of one hash are
// compared one by one. So no more of them than these, each with its numbers.
constexpr int64_t kHashModulus = (int64_t{1} << 61) - 1;
constexpr size_t kMaxAlikeKeys = 4096;

class Writer {
 public:
  explicit Writer(Heap& heap) : heap_(heap) {}

  std::string write(Value value) {
    pickle_ = "\x80\x04";
    tasks_.push_back({value, '\0'});
    while (!tasks_.empty()) {
      const Task task = tasks_.back();
      tasks_.pop_back();
      if (task.end == '\0') {
        begin(task.value);
      } else {
        finish(task);
      }
    }
    pickle_ += '.';
    return std::move(pickle_);
  }

 private:
  struct Task {
    Value value;
    char end;  // the opcode that ends a container; '\0': the value is yet to be written
  };
  struct Key {
    size_t operator()(Value value) const {
      return std::hash<uint64_t>()(value.payload() << Value::kTagBits | static_cast<uint64_t>(value.tag()));
    }
  };
  static constexpr uint32_t kUnfinished = UINT32_MAX;

  void begin(Value value) {
    switch (value.tag()) {
      case Tag::kUnset:
      case Tag::kNone:
        pickle_ += 'N';
        return;
      case Tag::kTrue:
        pickle_ += '\x88';
        return;
      case Tag::kFalse:
        pickle_ += '\x89';
        return;
      case Tag::kInt:
      case Tag::kBigInt:
        number(heap_.number(value));
        return;
      default:
        break;
    }
    const auto known = memo_.find(value);
    if (known != memo_.end()) {
      if (known->second == kUnfinished) unsupported("a tuple that contains itself");
      pickle_ += 'j';
      integer(known->second, 4);
      return;
    }
    switch (value.tag()) {
      case Tag::kText:
        text(heap_.text(value));
        memoize(value);
        return;
      case Tag::kLiteral:
        pickle_ += literal(value.payload());
        memoize(value);
        return;
      case Tag::kSize:
        pickle_ += "ctorch\nSize\n";
        ints(value);
        pickle_ += "\x85R";
        memoize(value);
        return;
      case Tag::kInts:
      case Tag::kIntsInTuple:
        ints(value);
        memoize(value);
        return;
      case Tag::kTuple:
        open(value, 't');
        for (size_t i = heap_.tuple_size(value); i > 0; --i) tasks_.push_back({heap_.item(value, i - 1), '\0'});
        return;
      case Tag::kPath:
        pickle_ += path_type(heap_.paths[value.payload()].type);
        tasks_.push_back({value, 'R'});
        tasks_.push_back({heap_.paths[value.payload()].parts, '\0'});
        return;
      case Tag::kList:
        pickle_ += ']';
        memoize(value);
        open(value, 'e');
        push_items(heap_.lists[value.payload()]);
        return;
      case Tag::kDict:
        dict(value);
        return;
      default:
        unsupported("objects where plain values are expected");
    }
  }

  void finish(const Task& task) {
    pickle_ += task.end;
    if (task.end == 't' || task.end == 'R') memoize(task.value);
    if (task.end != 'R') --depth_;
  }

  void open(Value value, char end) {
    if (++depth_ > kMaxDepth) corrupt("containers nested more than " + std::to_string(kMaxDepth) + " deep");
    if (end == 't') memo_[value] = kUnfinished;
    pickle_ += '(';
    tasks_.push_back({value, end});
  }

  void dict(Value value) {
    const Dict* dict = heap_.dict(value);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    pickle_ += '}';
    memoize(value);
    open(value, 'u');
    const size_t first = tasks_.size();
    push_items(dict->sequence);
    for (size_t i = first + 1; i < tasks_.size(); i += 2) {  // reversed: values and keys in turns
      const Value key = tasks_[i].value;
      // The hash of nested tuples that share their items can take forever.
      if (!key.is(Tag::kText) && !Heap::is_int(key) && !key.is(Tag::kInts) && !key.is(Tag::kNone) &&
          !key.is(Tag::kTrue) && !key.is(Tag::kFalse)) {
        unsupported("a dict whose keys are neither texts nor numbers");
      }
      alike_keys_ += numbers_that_are_alike(key);
      if (alike_keys_ > kMaxAlikeKeys) unsupported("dicts with many keys that are tuples or long numbers");
    }
  }

  // 0 for keys whose hash others cannot have, or not on purpose.
  size_t numbers_that_are_alike(Value key) const {
    if (key.is(Tag::kInts)) return 1 + heap_.tuple_size(key);
    if (!Heap::is_int(key)) return 0;
    const int64_t number = heap_.number(key);
    return -kHashModulus < number && number < kHashModulus ? 0 : 2;
  }

  void push_items(const Sequence& sequence) {
    const size_t first = tasks_.size();
    tasks_.resize(first + sequence.items);
    size_t at = tasks_.size();
    for_each_item(heap_, sequence, [&](Value item) { tasks_[--at] = {item, '\0'}; });
  }

  void memoize(Value value) {
    memo_[value] = next_index_;
    pickle_ += 'r';
    integer(next_index_++, 4);
  }

  void number(int64_t value) {
    pickle_ += "\x8a\x08";
    integer(static_cast<uint64_t>(value), 8);
  }
  void integer(uint64_t value, size_t width) {
    for (size_t i = 0; i < width; ++i) pickle_ += static_cast<char>(value >> (8 * i) & 0xff);
  }
  void text(std::string_view value) {
    pickle_ += 'X';
    integer(value.size(), 4);
    pickle_ += value;
  }
  void ints(Value value) {
    pickle_ += '(';
    for (size_t i = 0; i < heap_.tuple_size(value); ++i) number(heap_.ints[value.payload() + 1 + i]);
    pickle_ += 't';
    if (value.is(Tag::kIntsInTuple)) pickle_ += '\x85';
  }

  static const char* path_type(Global type) {
    switch (type) {
      case Global::kPosixPath:
        return "cpathlib\nPosixPath\n";
      case Global::kPurePosixPath:
        return "cpathlib\nPurePosixPath\n";
      default:
        return "cpathlib\nPureWindowsPath\n";
    }
  }

  // The opcode and its argument as they were in the file, where the unpickler has checked them.
  std::string_view literal(uint64_t position) const {
    const std::string& literals = heap_.literals;
    checkpoint::Bytes bytes(reinterpret_cast<const std::byte*>(literals.data()), literals.size());
    bytes.seek(position);
    switch (bytes.u8()) {
      case 'G':
        bytes.skip(8);
        break;
      case 'C':
      case 0x8a:
        bytes.skip(bytes.u8());
        break;
      case 'B':
      case 0x8b:
        bytes.skip(bytes.u32());
        break;
      default:
        bytes.skip(bytes.u64());
        break;
    }
    return std::string_view(literals).substr(position, bytes.position() - position);
  }

  Heap& heap_;
  std::string pickle_;
  std::vector<Task> tasks_;
  std::unordered_map<Value, uint32_t, Key> memo_;
  uint32_t next_index_ = 0;
  size_t depth_ = 0;
  size_t alike_keys_ = 0;
};

}  // namespace

std::string plain_pickle(Heap& heap, Value value) { return Writer(heap).write(value); }

}  // namespace dcp_fast::metadata
