#include "bindings/plain_values.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "checkpoint/bytes.h"
#include "little_endian.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using checkpoint::Bytes;

// Opcodes: CPython's Lib/pickletools.py. Whatever is not as Python's pickler writes it ends with `false`.
class PlainUnpickler {
 public:
  explicit PlainUnpickler(const std::string& pickle)
      : pickle_(reinterpret_cast<const std::byte*>(pickle.data()), pickle.size()) {}

  py::object run() {
    if (pickle_.u8() != 0x80 || pickle_.u8() > 5) return {};
    while (true) {
      const size_t begin = pickle_.position();
      const uint8_t opcode = pickle_.u8();
      if (!pickle_.ok()) return {};
      if (opcode == '.') break;
      if (!(opcode == 0x95 ? frame() : scalar(opcode) || memo(opcode) || container(opcode))) return {};
      if (begin < frame_end_ && pickle_.position() > frame_end_) return {};  // frames end between opcodes
    }
    const bool is_all = stack_.size() == 1 && marks_.empty() && pickle_.position() == pickle_.size();
    return is_all ? std::move(stack_.back()) : py::object();
  }

  bool can_change() const { return can_change_; }

 private:
  bool frame() {  // FRAME: writers begin one behind another
    const bool is_first = pickle_.position() > frame_end_;
    const uint64_t size = pickle_.u64();
    if (!pickle_.ok() || !is_first || size > pickle_.size() - pickle_.position()) return false;
    frame_end_ = pickle_.position() + size;
    return true;
  }

  // Numbers, texts and singletons

  bool scalar(uint8_t opcode) {
    switch (opcode) {
      case 'N':  // NONE
        return push(py::none());
      case 0x88:  // NEWTRUE
        return push(py::bool_(true));
      case 0x89:  // NEWFALSE
        return push(py::bool_(false));
      case 'K':  // BININT1
        return push_number(pickle_.u8());
      case 'M':  // BININT2
        return push_number(pickle_.u16());
      case 'J':  // BININT
        return push_number(static_cast<int32_t>(pickle_.u32()));
      case 0x8a:  // LONG1
        return long1();
      case 'G':  // BINFLOAT
        return push_float();
      case 'X':  // BINUNICODE
        return push_text(pickle_.u32());
      case 0x8c:  // SHORT_BINUNICODE
        return push_text(pickle_.u8());
      case 'B':  // BINBYTES
        return push_bytes(pickle_.u32());
      case 'C':  // SHORT_BINBYTES
        return push_bytes(pickle_.u8());
      default:
        return false;
    }
  }

  bool push_number(int64_t number) { return push(py::reinterpret_steal<py::object>(PyLong_FromLongLong(number))); }
  bool long1() {
    const size_t width = pickle_.u8();
    const std::string_view digits = pickle_.text(width);
    if (!pickle_.ok() || width > 8) return false;
    return push_number(signed_from_little_endian(digits.data(), digits.size()));
  }
  bool push_float() {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | pickle_.u8();
    double number = 0;
    std::memcpy(&number, &bits, sizeof(number));
    return push(py::reinterpret_steal<py::object>(PyFloat_FromDouble(number)));
  }
  bool push_text(size_t size) {
    const std::string_view text = pickle_.text(size);
    if (!pickle_.ok()) return false;
    PyObject* decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "surrogatepass");
    if (decoded == nullptr && PyErr_ExceptionMatches(PyExc_UnicodeError) != 0) {
      PyErr_Clear();
      return false;
    }
    return push(py::reinterpret_steal<py::object>(decoded));
  }
  bool push_bytes(size_t size) {
    const std::string_view bytes = pickle_.text(size);
    if (!pickle_.ok()) return false;
    return push(py::reinterpret_steal<py::object>(
        PyBytes_FromStringAndSize(bytes.data(), static_cast<py::ssize_t>(bytes.size()))));
  }

  // The memo

  bool memo(uint8_t opcode) {
    switch (opcode) {
      case 0x94:  // MEMOIZE
        return memoize(memo_.size());
      case 'q':  // BINPUT
        return memoize(pickle_.u8());
      case 'r':  // LONG_BINPUT
        return memoize(pickle_.u32());
      case 'h':  // BINGET
        return recall(pickle_.u8());
      case 'j':  // LONG_BINGET
        return recall(pickle_.u32());
      default:
        return false;
    }
  }

  bool memoize(size_t index) {
    // Writers count from zero.
    if (index != memo_.size() || !has(1)) return false;
    memo_.push_back(stack_.back());
    return true;
  }
  bool recall(size_t index) { return index < memo_.size() && push(memo_[index]); }

  // Tuples, lists, dicts

  bool container(uint8_t opcode) {
    switch (opcode) {
      case '(':  // MARK
        marks_.push_back(stack_.size());
        return true;
      case ')':  // EMPTY_TUPLE
        return tuple(stack_.size());
      case 't':  // TUPLE
        return !marks_.empty() && tuple(pop_mark());
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        return has(opcode - 0x84U) && tuple(stack_.size() - (opcode - 0x84U));
      case ']':  // EMPTY_LIST
        can_change_ = true;
        return push(py::reinterpret_steal<py::object>(PyList_New(0)));
      case 'a':  // APPEND
        return has(2) && extend_list(stack_.size() - 1);
      case 'e':  // APPENDS
        return !marks_.empty() && extend_list(pop_mark());
      case '}':  // EMPTY_DICT
        can_change_ = true;
        return push(py::reinterpret_steal<py::object>(PyDict_New()));
      case 's':  // SETITEM
        return has(3) && extend_dict(stack_.size() - 2);
      case 'u':  // SETITEMS
        return !marks_.empty() && extend_dict(pop_mark());
      default:
        return false;
    }
  }

  bool tuple(size_t begin) {
    const auto made = py::reinterpret_steal<py::object>(PyTuple_New(static_cast<py::ssize_t>(stack_.size() - begin)));
    if (!made) throw py::error_already_set();
    for (size_t i = begin; i < stack_.size(); ++i) {
      PyTuple_SET_ITEM(made.ptr(), static_cast<py::ssize_t>(i - begin), stack_[i].release().ptr());
    }
    stack_.resize(begin);
    return push(made);
  }
  // What a list or dict is given stands on the stack from `begin` on, and it itself below.
  bool extend_list(size_t begin) {
    if (begin <= floor() || !PyList_CheckExact(stack_[begin - 1].ptr())) return false;
    for (size_t i = begin; i < stack_.size(); ++i) {
      if (PyList_Append(stack_[begin - 1].ptr(), stack_[i].ptr()) != 0) throw py::error_already_set();
    }
    stack_.resize(begin);
    return true;
  }
  bool extend_dict(size_t begin) {
    if (begin <= floor() || !PyDict_CheckExact(stack_[begin - 1].ptr())) return false;
    if ((stack_.size() - begin) % 2 != 0) return false;
    for (size_t i = begin; i < stack_.size(); i += 2) {
      PyObject* key = stack_[i].ptr();
      if (!is_cheap(key)) return false;
      if (PyDict_SetItem(stack_[begin - 1].ptr(), key, stack_[i + 1].ptr()) != 0) throw py::error_already_set();
    }
    stack_.resize(begin);
    return true;
  }

  // Whether the key is hashed and compared in time, with all others so far. Python's unpickler has a closer look.
  bool is_cheap(PyObject* key) {
    if (PyUnicode_CheckExact(key) || PyBytes_CheckExact(key)) {
      // Long ones that are equal, and not the same, are compared to their end.
      key_bytes_ += static_cast<size_t>(PyObject_Size(key));
      return key_bytes_ <= kKeyBytes + kKeyBytesPerByte * pickle_.size();
    }
    if (PyLong_CheckExact(key)) {
      const int64_t number = PyLong_AsLongLong(key);
      return (-kHashModulus < number && number < kHashModulus) || ++alike_keys_ <= kMaxAlikeKeys;
    }
    // At most 34 floats have the same hash. That of nested tuples that share their items can take forever.
    return PyFloat_CheckExact(key) || key == Py_None || PyBool_Check(key);
  }

  // The stack

  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  bool has(size_t count) const { return stack_.size() - floor() >= count; }
  size_t pop_mark() {
    const size_t mark = marks_.back();
    marks_.pop_back();
    return mark;
  }
  bool push(py::object value) {
    if (!value) throw py::error_already_set();  // MemoryError
    stack_.push_back(std::move(value));
    return true;
  }

  // Numbers that differ by a multiple of it have one hash, and are compared one by one.
  static constexpr int64_t kHashModulus = (int64_t{1} << 61) - 1;
  static constexpr size_t kMaxAlikeKeys = 256;
  // Writers name a key again by two bytes.
  static constexpr size_t kKeyBytesPerByte = 64;
  static constexpr size_t kKeyBytes = size_t{1} << 20;

  Bytes pickle_;
  size_t key_bytes_ = 0;
  size_t alike_keys_ = 0;  // that may have the hash of others
  size_t frame_end_ = 0;
  std::vector<py::object> stack_;
  std::vector<size_t> marks_;  // sizes of the stack
  std::vector<py::object> memo_;
  bool can_change_ = false;
};

}  // namespace

py::object PlainValues::parse(const std::string& pickle) {
  const auto known = known_.find(pickle);
  if (known != known_.end()) return known->second;
  PlainUnpickler unpickler(pickle);
  py::object value = unpickler.run();
  if (value && !unpickler.can_change()) known_.emplace(pickle, value);
  return value;
}

}  // namespace dcp_fast
