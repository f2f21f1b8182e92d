#include "checkpoint/tensor_pickle.h"

#include <limits>
#include <utility>

#include "little_endian.h"

namespace dcp_fast::checkpoint {

namespace {

// A value on the unpickler's stack.
struct Value {
  enum class Kind { kNothing, kBool, kInt, kText, kTuple, kGlobal, kStorage, kOrderedDict, kDict, kTensor };
  Kind kind = Kind::kNothing;
  int64_t number = 0;           // kInt, kBool; kStorage: elements (bytes if untyped)
  std::string_view text;        // kText; kGlobal: the name; kStorage: the key
  std::string_view module;      // kGlobal
  DType dtype = kUnknownDType;  // kStorage (unknown if untyped), kTensor
  std::vector<Value> items;     // kTuple; kTensor: storage, sizes, strides
};

using Kind = Value::Kind;

// A tensor's pickle needs a dozen values and some fifty opcodes, and more for many dimensions. The limits bound what a
// hostile pickle can do, such as nest tuples so deep that freeing them would overflow a thread's stack.
constexpr size_t kMaxStack = 256;
constexpr int kMaxOpcodes = 4096;

class TensorUnpickler {
 public:
  explicit TensorUnpickler(Bytes pickle) : pickle_(pickle) {
    stack_.reserve(16);
    memo_.reserve(16);
  }

  std::optional<PickledTensor> run() {
    for (int i = 0; i < kMaxOpcodes && stack_.size() <= kMaxStack; ++i) {
      const uint8_t opcode = pickle_.u8();
      if (opcode == '.') return finish();
      if (!pickle_.ok() || !step(opcode)) return std::nullopt;
    }
    return std::nullopt;
  }

 private:
  bool step(uint8_t opcode) {
    switch (opcode) {
      case 0x80:                   // PROTO
        return pickle_.u8() <= 3;  // as torch.load(weights_only=True)
      case 'c': {                  // GLOBAL
        const std::string_view module = pickle_.line();
        const std::string_view name = pickle_.line();
        return push_global(module, name);
      }
      case 'X':  // BINUNICODE
        return push_text(pickle_.text(pickle_.u32()));
      case 'K':  // BININT1
        return push_number(Kind::kInt, pickle_.u8());
      case 'M':  // BININT2
        return push_number(Kind::kInt, pickle_.u16());
      case 'J':  // BININT
        return push_number(Kind::kInt, static_cast<int32_t>(pickle_.u32()));
      case 0x8a:  // LONG1
        return long1();
      case 0x88:  // NEWTRUE
        return push_number(Kind::kBool, 1);
      case 0x89:  // NEWFALSE
        return push_number(Kind::kBool, 0);
      case '}':  // EMPTY_DICT
        return push_number(Kind::kDict, 0);
      case '(':  // MARK
        marks_.push_back(stack_.size());
        return marks_.size() <= kMaxStack;
      case ')':  // EMPTY_TUPLE
        return tuple(0);
      case 't':  // TUPLE
        return tuple_to_mark();
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        return tuple(opcode - 0x84);
      case 'q':  // BINPUT
        return memoize(pickle_.u8());
      case 'r':  // LONG_BINPUT
        return memoize(pickle_.u32());
      case 'h':  // BINGET
        return recall(pickle_.u8());
      case 'j':  // LONG_BINGET
        return recall(pickle_.u32());
      case 'Q':  // BINPERSID
        return persistent_id();
      case 'R':  // REDUCE
        return reduce();
      default:
        return false;
    }
  }

  Value pop() {
    Value value = std::move(stack_.back());
    stack_.pop_back();
    return value;
  }
  bool push_number(Kind kind, int64_t number) {
    Value value;
    value.kind = kind;
    value.number = number;
    stack_.push_back(std::move(value));
    return true;
  }
  bool push_text(std::string_view text) {
    Value value;
    value.kind = Kind::kText;
    value.text = text;
    stack_.push_back(std::move(value));
    return true;
  }
  bool push_global(std::string_view module, std::string_view name) {
    Value value;
    value.kind = Kind::kGlobal;
    value.text = name;
    value.module = module;
    stack_.push_back(std::move(value));
    return true;
  }

  bool long1() {
    const size_t width = pickle_.u8();
    if (width > 8) return false;
    const std::string_view digits = pickle_.text(width);
    const int64_t number = signed_from_little_endian(digits.data(), digits.size());
    return number >= 0 && push_number(Kind::kInt, number);
  }

  bool tuple(size_t count) {
    if (stack_.size() < count || (!marks_.empty() && stack_.size() - count < marks_.back())) return false;
    Value value;
    value.kind = Kind::kTuple;
    const auto first = stack_.end() - static_cast<std::ptrdiff_t>(count);
    value.items.assign(std::make_move_iterator(first), std::make_move_iterator(stack_.end()));
    stack_.erase(first, stack_.end());
    stack_.push_back(std::move(value));
    return true;
  }
  bool tuple_to_mark() {
    if (marks_.empty() || marks_.back() > stack_.size()) return false;
    const size_t count = stack_.size() - marks_.back();
    marks_.pop_back();
    return tuple(count);
  }

  bool memoize(uint32_t key) {
    if (stack_.empty()) return false;
    // Only leaves are ever recalled in a tensor's pickle; keeping trees would let a small file grow large.
    if (key >= kMaxStack) return false;
    if (key >= memo_.size()) memo_.resize(key + 1);
    const Value& top = stack_.back();
    memo_[key] = top.items.empty() ? top : Value();
    return true;
  }
  bool recall(uint32_t key) {
    if (key >= memo_.size() || memo_[key].kind == Kind::kNothing) return false;
    stack_.push_back(memo_[key]);
    return true;
  }

  // ("storage", storage class, key, location, element count)
  bool persistent_id() {
    if (stack_.empty()) return false;
    const Value id = pop();
    if (id.kind != Kind::kTuple || id.items.size() != 5) return false;
    const std::vector<Value>& parts = id.items;
    if (parts[0].kind != Kind::kText || parts[0].text != "storage" || parts[1].kind != Kind::kGlobal ||
        parts[2].kind != Kind::kText || parts[3].kind != Kind::kText || parts[4].kind != Kind::kInt) {
      return false;
    }
    Value storage;
    storage.kind = Kind::kStorage;
    storage.text = parts[2].text;
    storage.number = parts[4].number;
    if (!is_global(parts[1], "torch.storage", "UntypedStorage")) {
      if (parts[1].module != "torch") return false;
      storage.dtype = dtype_by_storage(parts[1].text);
      if (storage.dtype == kUnknownDType) return false;
    }
    stack_.push_back(std::move(storage));
    return true;
  }

  bool reduce() {
    if (stack_.size() < 2) return false;
    Value arguments = pop();
    const Value function = pop();
    if (function.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) return false;
    if (is_global(function, "collections", "OrderedDict")) {
      return arguments.items.empty() && push_number(Kind::kOrderedDict, 0);
    }
    if (is_global(function, "torch._utils", "_rebuild_tensor_v2")) return rebuild_tensor(arguments.items, 6);
    if (is_global(function, "torch._utils", "_rebuild_tensor_v3")) return rebuild_tensor(arguments.items, 7);
    if (is_global(function, "torch._utils", "_rebuild_parameter")) return rebuild_parameter(arguments.items);
    return false;
  }

  static bool is_global(const Value& value, std::string_view module, std::string_view name) {
    return value.kind == Kind::kGlobal && value.module == module && value.text == name;
  }

  // (storage, storage_offset, size, stride, requires_grad, backward_hooks[, dtype][, metadata])
  bool rebuild_tensor(std::vector<Value>& arguments, size_t required) {
    const size_t count = arguments.size();
    if (count != required && !(count == required + 1 && arguments[required].kind == Kind::kDict)) return false;
    if (arguments[0].kind != Kind::kStorage || arguments[1].kind != Kind::kInt || arguments[2].kind != Kind::kTuple ||
        arguments[3].kind != Kind::kTuple || arguments[4].kind != Kind::kBool ||
        arguments[5].kind != Kind::kOrderedDict) {
      return false;
    }
    DType dtype = arguments[0].dtype;
    if (required == 7) {
      const Value& named = arguments[6];
      if (dtype != kUnknownDType || named.kind != Kind::kGlobal || named.module != "torch") return false;
      dtype = dtype_by_name(named.text);
    }
    if (dtype == kUnknownDType) return false;
    Value tensor;
    tensor.kind = Kind::kTensor;
    tensor.dtype = dtype;
    tensor.number = arguments[1].number;
    for (const size_t i : {size_t{0}, size_t{2}, size_t{3}}) tensor.items.push_back(std::move(arguments[i]));
    stack_.push_back(std::move(tensor));
    return true;
  }

  // (data, requires_grad, backward_hooks)
  bool rebuild_parameter(std::vector<Value>& arguments) {
    if (arguments.size() != 3 || arguments[0].kind != Kind::kTensor || arguments[1].kind != Kind::kBool ||
        arguments[2].kind != Kind::kOrderedDict) {
      return false;
    }
    stack_.push_back(std::move(arguments[0]));
    return true;
  }

  static std::optional<std::vector<int64_t>> numbers(const Value& tuple) {
    std::vector<int64_t> result;
    for (const Value& item : tuple.items) {
      if (item.kind != Kind::kInt || item.number < 0) return std::nullopt;
      result.push_back(item.number);
    }
    return result;
  }

  std::optional<PickledTensor> finish() const {
    if (!pickle_.ok() || stack_.size() != 1 || stack_[0].kind != Kind::kTensor) return std::nullopt;
    const Value& tensor = stack_[0];
    const Value& storage = tensor.items[0];
    auto sizes = numbers(tensor.items[1]);
    auto strides = numbers(tensor.items[2]);
    if (!sizes || !strides || sizes->size() != strides->size() || tensor.number < 0 || storage.number < 0) {
      return std::nullopt;
    }
    const int64_t unit = storage.dtype == kUnknownDType ? 1 : info(storage.dtype).itemsize;
    if (storage.number > std::numeric_limits<int64_t>::max() / unit) return std::nullopt;
    PickledTensor result;
    result.dtype = tensor.dtype;
    result.storage_key = storage.text;
    result.storage_bytes = storage.number * unit;
    result.storage_offset = tensor.number;
    result.sizes = std::move(*sizes);
    result.strides = std::move(*strides);
    return result;
  }

  Bytes pickle_;
  std::vector<Value> stack_;
  std::vector<size_t> marks_;
  std::vector<Value> memo_;
};

}  // namespace

std::optional<PickledTensor> parse_tensor_pickle(Bytes pickle) { return TensorUnpickler(pickle).run(); }

}  // namespace dcp_fast::checkpoint
