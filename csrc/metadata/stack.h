// The stack of the unpickler, with marks: an opcode sees no value below the last mark.
#pragma once

#include <cstddef>
#include <vector>

#include "metadata/failure.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

class Stack {
 public:
  // What takes or shows values throws Error(kCorruptMetadata) where the stack has too few above the last mark.

  size_t size() const { return values_.size(); }
  size_t above_mark() const { return values_.size() - fence_; }
  bool has_mark() const { return !marks_.empty(); }
  const Value* data() const { return values_.data(); }
  // From the bottom, whatever the marks.
  Value operator[](size_t i) const { return values_[i]; }
  Value back() const { return values_.back(); }

  void need(size_t count) const {
    if (above_mark() < count) corrupt("an opcode that needs more values than there are");
  }
  Value top() const {
    need(1);
    return values_.back();
  }
  void push(Value value) { values_.push_back(value); }
  Value pop() {
    need(1);
    const Value value = values_.back();
    values_.pop_back();
    return value;
  }
  // The value below those that begin at `begin`.
  Value below(size_t begin) const {
    if (begin <= fence_) corrupt("an opcode that needs more values than there are");
    return values_[begin - 1];
  }
  void shrink(size_t size) { values_.resize(size); }

  void mark() {
    marks_.push_back(values_.size());
    fence_ = values_.size();
  }
  // Where the values above the last mark begin; the mark goes, they stay.
  size_t pop_mark() {
    if (marks_.empty()) corrupt("an opcode that needs a mark");
    fence_ = marks_.size() > 1 ? marks_[marks_.size() - 2] : 0;
    const size_t begin = marks_.back();
    marks_.pop_back();
    return begin;
  }

  struct State {
    size_t size;
    size_t marks;
    size_t fence;
  };
  State state() const { return {values_.size(), marks_.size(), fence_}; }
  // After one opcode, which took at most one mark: as many values as before, though what it took is not put back.
  void restore(const State& before) {
    if (marks_.size() < before.marks) marks_.push_back(before.fence);
    values_.resize(before.size);
  }

  // How many values stand above each mark, up to the next one.
  std::vector<size_t> heights() const {
    std::vector<size_t> heights;
    heights.reserve(marks_.size());
    for (size_t i = 0; i < marks_.size(); ++i) {
      heights.push_back((i + 1 < marks_.size() ? marks_[i + 1] : values_.size()) - marks_[i]);
    }
    return heights;
  }
  // Where the values above the first mark begin.
  size_t first_mark() const { return marks_.front(); }

 private:
  std::vector<Value> values_;
  std::vector<size_t> marks_;  // sizes of the stack
  size_t fence_ = 0;           // the last of them
};

}  // namespace dcp_fast::metadata
